"""Fused losses over an LM head that never hold (N, V) logits.

Teacher-student divergences, token and sequence log-probabilities, entropy and cross-entropy
straight from hidden states and head weights, and the three signals of DuDi in one sweep. See each
function's docstring for the naive code that it replaces.
"""

from dudi_kernels.align import Aligner, Alignment, Tokens, align_responses
from dudi_kernels.api import (
    DistillLoss,
    DistillRows,
    linear_cross_entropy,
    linear_distill,
    linear_distill_loss,
    linear_log_prob,
    sequence_log_prob,
)
from dudi_kernels.cost import MemoryPlan, plan_memory
from dudi_kernels.divergences import DIVERGENCES, Divergence
from dudi_kernels.head import LMHead, LoRA
from dudi_kernels.likeliest import likeliest_tokens
from dudi_kernels.shard import VocabularyShard
from dudi_kernels.three_signals import DuDiLoss, linear_dudi_loss
from dudi_kernels.topk import TopKTeacher
from dudi_kernels.verbalizer import Verbalizer
from dudi_kernels.vocabulary.coverage import Coverage

__all__ = [
    "DIVERGENCES",
    "Aligner",
    "Alignment",
    "Coverage",
    "DistillLoss",
    "DistillRows",
    "Divergence",
    "DuDiLoss",
    "LMHead",
    "LoRA",
    "MemoryPlan",
    "Tokens",
    "TopKTeacher",
    "Verbalizer",
    "VocabularyShard",
    "align_responses",
    "likeliest_tokens",
    "linear_cross_entropy",
    "linear_distill",
    "linear_distill_loss",
    "linear_dudi_loss",
    "linear_log_prob",
    "plan_memory",
    "sequence_log_prob",
]
