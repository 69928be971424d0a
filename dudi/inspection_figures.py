"""What `dudi verbalize` shows: a teacher's say on a few rows of data, dense, token by token.

For each row of a trainer's data: the prompt that the teacher reads; the reference response in both
tokens, and which rows pair; what the verbalized teacher says beside the plain one; and what reaches
the student after refinement and the map between the vocabularies. From the models' own logits, in
float64: it shares nothing with the fused losses that it shows the input of.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dudi.config import DuDiConfig
from dudi.rollout import inference_mode_of
from dudi.teaching import confidence
from dudi.trainer import DuDiTrainer
from dudi_kernels import Tokens, Verbalizer

REST = "(the rest)"  # mass without a token of the student's
MOST_MEMBERS = 4  # of a class that are spelt
Says = list[tuple[str, float]]  # likeliest tokens and their probabilities


class TokenRow(NamedTuple):
    """One row of the response: what comes after the tokens before."""

    token: str  # the student's
    partner: str | None  # the teacher's token at the same byte; None: the row has no partner
    plain: Says  # under the student's prompt
    verbalized: Says  # under the verbalizer's
    learnt: Says  # refined, in the student's tokens
    divergence: float | None  # KL(verbalized || plain), nats
    weight: float  # of the row's divergence: 0 where it is left out


@dataclass
class Shown:
    """One row of the data."""

    language: str
    row: int
    prompt: str  # the student's
    teacher_prompt: str
    teacher_prompt_ids: list[int]
    response: str
    tokens: list[TokenRow]

    @property
    def paired(self) -> float:
        return sum(t.partner is not None for t in self.tokens) / len(self.tokens)

    @property
    def divergence(self) -> float | None:
        """Mean KL(verbalized || plain) over the rows that pair."""
        found = [t.divergence for t in self.tokens if t.divergence is not None]
        return sum(found) / len(found) if found else None


def choose_rows(dataset: Any, count: int) -> list[int]:
    """The first rows of each language, in the order of the data."""
    if "language" not in dataset.column_names:
        return list(range(min(count, len(dataset))))
    taken: Counter[str] = Counter()
    chosen = []
    for i, language in enumerate(dataset.with_format(None)["language"][:]):
        taken[language] += 1
        if taken[language] <= count:
            chosen.append(i)
    return chosen


def inspect_rows(trainer: DuDiTrainer, top: int = 5) -> list[Shown]:
    """Every row of a trainer's training data; `top` tokens of each distribution."""
    with inference_mode_of(trainer.model), inference_mode_of(trainer.teacher):
        return list(map(_Inspector(trainer, top), trainer.train_dataset))


class _Inspector:
    def __init__(self, trainer: DuDiTrainer, top: int) -> None:
        self.trainer, self.top = trainer, top
        self.student, self.teacher = trainer.processing_class, trainer.bridge.tokenizer
        self.spell = Speller(self.student)
        same = self.teacher is self.student
        self.spell_teacher = self.spell if same else Speller(self.teacher)
        v = trainer.bridge.verbalizer
        self.map = None if v is None else v.to("cpu")

    def __call__(self, row: dict[str, Any]) -> Shown:
        ids, seen = row["completion_ids"], self._teacher_prompt(row)
        texts, pairs = self._paired(ids)
        verbalized, plain = (
            _log_probs(self.trainer.teacher, prompt, texts)
            for prompt in (seen, row["plain_prompt_ids"])
        )
        learnt = _learnt(self.trainer.args, self.map, verbalized, plain)
        tokens = []
        for i, token in enumerate(map(self.spell, ids)):
            if i not in pairs:
                tokens.append(TokenRow(token, None, [], [], [], None, 0.0))
                continue
            j = pairs[i]
            tokens.append(self._row(token, i, texts[j], verbalized[j], plain[j], learnt[j]))
        return Shown(
            row["language"],
            row["row"],
            self.student.decode(row["prompt_ids"]),
            self.teacher.decode(seen),
            seen,
            self.student.decode(ids),
            tokens,
        )

    def _teacher_prompt(self, row: dict[str, Any]) -> list[int]:
        """With a greedy sample where the template shows one."""
        verbalizer = self.trainer.verbalizer
        if verbalizer is None or not verbalizer.reads_samples:
            return list(row["teacher_prompt_ids"])
        rollout = self.trainer.greedy_sample(torch.tensor(row["prompt_ids"]))
        prompts = self.trainer.teaching.prompts_with([row["row"]], rollout.completions)
        return prompts[0].tolist()

    def _paired(self, ids: list[int]) -> tuple[list[int], dict[int, int]]:
        """The response in the teacher's tokens, and the teacher's row for each of the student's."""
        pairing = self.trainer.bridge.pairing
        if pairing is None:
            return ids, {i: i for i in range(len(ids))}
        found = pairing([ids])
        rows = (found.student_rows[0].tolist(), found.teacher_rows[0].tolist())
        return found.teacher_ids[0], dict(zip(*rows, strict=True))

    def _row(
        self, token: str, i: int, target: int, verbalized: Tensor, plain: Tensor, learnt: Tensor
    ) -> TokenRow:
        """Of log-probabilities (U,) twice, and what reaches the student."""
        a = self.trainer.args
        weight = float(i >= a.teacher_skip_tokens)
        if a.confidence_gating:
            weight *= float(confidence(verbalized[target], plain[target], a.confidence_gating))
        gap = torch.where(verbalized.isinf(), 0, verbalized.exp() * (verbalized - plain))
        return TokenRow(
            token,
            self.spell_teacher(target),
            self._top(plain.exp(), self.spell_teacher),
            self._top(verbalized.exp(), self.spell_teacher),
            self._top(learnt, self._class_name),
            float(gap.sum()),
            weight,
        )

    def _top(self, p: Tensor, name: Callable[[int], str]) -> Says:
        found = p.topk(min(self.top, len(p)))
        pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        return [(name(i), value) for value, i in pairs if value > 0]

    def _class_name(self, i: int) -> str:
        """A class by its tokens of the student's: one, unless words of one meaning share it."""
        if self.map is None:
            return self.spell(i)
        members = (self.map.student_class == i).nonzero()[:MOST_MEMBERS, 0].tolist()
        return " | ".join(map(self.spell, members)) or REST


@torch.no_grad()
def _log_probs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """(R, U) float64, of the rows that predict the response."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *response]], device=device)
    rows = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return model(ids, use_cache=False).logits[0, rows].double().log_softmax(-1).cpu()


def _learnt(
    args: DuDiConfig, verbalizer: Verbalizer | None, verbalized: Tensor, plain: Tensor
) -> Tensor:
    """(R, K), or (R, K + 1) with what has no class of the student's: refined and mapped."""
    share = args.verbalized_share
    logits = share * verbalized + (1 - share) * plain if share < 1 else verbalized
    p = (logits / (args.teacher_temperature or args.temperature)).softmax(-1)
    if args.teacher_top_p < 1:
        p = _nucleus(p, args.teacher_top_p)
    if verbalizer is None:
        return p
    mass = verbalizer.project(p)
    mapped = mass.sum(-1, keepdim=True)
    if verbalizer.unmatched == "bucket" and not verbalizer.matched.all():
        return torch.cat([mass, (1 - mapped).clamp(min=0)], -1)
    return mass / mapped  # nothing of the student's faces what is left


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens of this mass, those that tie with the last one included."""
    ordered = p.sort(-1, descending=True).values
    count = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)
    kept = torch.where(p >= ordered.gather(-1, count - 1), p, 0)
    return kept / kept.sum(-1, keepdim=True)


def _visible(text: str) -> str:
    """Spaces alone, line ends and lone marks (a vowel of a character before) can be seen."""
    if text.isspace():
        text = text.replace(" ", "␣")
    if unicodedata.category(text[0]).startswith("M"):
        text = f"◌{text}"
    return text.replace("\n", "⏎").replace("\t", "⇥")


class Speller:
    """Tokens as text that can be read: a part of a character shows its bytes, as \\xe1."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            self.bytes = Tokens.of(tokenizer).bytes
        except (TypeError, ValueError):  # not one whose bytes are known
            self.bytes = [tokenizer.decode([i]).encode() for i in range(len(tokenizer))]

    def __call__(self, i: int) -> str:
        own = self.bytes[i] if i < len(self.bytes) else None
        if own:
            return _visible(own.decode(errors="backslashreplace"))
        return str(self.tokenizer.convert_ids_to_tokens(i) or i)  # a special one, or padding
