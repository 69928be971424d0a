"""Student and teacher in parts on two and on four ranks (gloo, CPU) do what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_distributed import LAUNCHER, run
from torch import nn

from dudi.sharding import shard
from dudi.trainer import DuDiTrainer

SCRIPT = str(Path(__file__).with_name("sharded_once.py"))
FOUR = (*LAUNCHER[:-1], "--nproc_per_node=4")
RANKS = {"tied": "two", "untied": "two", "adapter": "two", "ddp": "two"}
RANKS |= {"replicas": "four", "all four": "four", "ddp of four": "four"}
LOSSES = ("loss", "off_policy_loss", "on_policy_loss", "preference_loss", "ce_loss")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run(SCRIPT, str(folder / "one"), *RANKS)
    for launcher, ranks in ((LAUNCHER, "two"), (FOUR, "four")):
        more = ["parts"] if ranks == "two" else []
        run(*launcher, SCRIPT, str(folder / ranks), *more, *(c for c in RANKS if RANKS[c] == ranks))
    return folder


@pytest.mark.parametrize("case", RANKS)
def test_sharded_equals_one_process(runs: Path, case: str) -> None:
    """All signals, accumulation with a shorter last step and a last batch that not all ranks have
    rows of, evaluation, and what is saved."""
    folders = [runs / ranks / case for ranks in ("one", RANKS[case])]
    one, several = (tiny.logged(folder) for folder in folders)
    assert len(one) == len(several) > 0
    for a, b in zip(one, several, strict=True):
        for key in (*LOSSES, "entropy", "teacher_entropy", "logps/rejected", "num_tokens"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
        # torch's fp32 norm of 65,548 elements is 2e-5 off, of its halves 1e-5
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=3e-5)
    before, after = (json.loads((folder / "figures.json").read_text()) for folder in folders)
    for when in ("before", "after"):
        assert after[when] == pytest.approx(before[when], rel=1e-5)
    name = "adapter_model" if case == "adapter" else "model"
    a, b = (load_file(folder / "model" / f"{name}.safetensors") for folder in folders)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).norm() <= 1e-5 * a[key].norm(), key


def test_resumed_run_equals_one_never_stopped(runs: Path) -> None:
    """The driver compared the final weights bit for bit; here what both logged, and their files."""
    whole, again = (tiny.logged(runs / "two" / "parts" / name) for name in ("whole", "again"))
    assert again == whole[1:]
    checkpoints = [runs / "two" / "parts" / n / "checkpoint-2" for n in ("whole", "again")]
    for name in ("model", "reference-0", "reference-1"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in checkpoints)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_one_process_shards_nothing(tmp_path: Path) -> None:
    def trainer(**settings: object) -> DuDiTrainer:
        return DuDiTrainer(
            tiny.model(0),
            tiny.model(1),
            args=tiny.config(tmp_path, **settings),
            train_dataset=tiny.rows(4),
            processing_class=tiny.tokenizer(),
        )

    assert not trainer(fsdp_size="auto").sharded
    with pytest.raises(ValueError, match="fsdp_size must divide the number of processes, 1, got 2"):
        trainer(fsdp_size=2)


def test_what_can_not_be_sharded_is_named() -> None:
    mesh = SimpleNamespace(device_type="cpu")
    nameless = tiny.model()
    nameless._no_split_modules = None
    mixed = tiny.model()
    mixed.model.norm.to(torch.bfloat16)
    quantized = tiny.model()
    quantized.model.norm.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), False)
    for model, message in (
        (nameless, "LlamaForCausalLM does not tell its layers"),
        (mixed, "trained weights must have one dtype, got bfloat16, float32"),
        (quantized, r"its model.norm.weight is quantized or sharded already \(Tensor, torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            shard(model, mesh, "student")  # type: ignore[arg-type]
