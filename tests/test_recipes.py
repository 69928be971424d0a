"""Every recipe in configs/ runs as a miniature: its signals on, its options as they were."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import full_size
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dudi import cli
from dudi.callbacks import read_jsonl
from dudi.config import DuDiConfig, read_config_file
from dudi.lexicon import read_lexicon
from dudi.miniature import recipe as recipes
from dudi.miniature.architectures import GEMMA3, QWEN2_5, cut, known, original
from dudi.miniature.command import check_signals
from dudi.miniature.data import few_rows, first_row, like, write_lexicon
from dudi.models import load_tokenizer
from dudi.planning.plan import plan_run, read_options
from dudi_kernels import LMHead, Verbalizer

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(p for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("ablation"))
PAPER = CONFIGS / "dudi-qwen2.5-0.5b-from-3b.yaml"
# What a miniature may have otherwise than its recipe; all else must be as it was.
MAY_DIFFER = {
    "model_name_or_path", "model_config", "tokenizer_name_or_path",
    "teacher_model_name_or_path", "teacher_tokenizer_name_or_path",
    "dataset_name", "dataset_test_name", "output_dir",
    "max_prompt_length", "max_completion_length", "max_teacher_prompt_length",
    "per_device_train_batch_size", "gradient_accumulation_steps", "rollout_batch_size",
    "reference_sync_steps", "logging_steps", "save_steps", "eval_steps", "warmup_steps",
}  # fmt: skip
# GPUs, and GiB of each.
MADE_FOR = {
    "dudi-gemma-3-1b-from-qwen3-8b": (1, 80),
    "dudi-gemma-3-270m-from-4b": (1, 24),
    "dudi-llama-3.2-1b-from-3b-lora": (1, 24),
    "dudi-llama-3.2-1b-from-3b-qlora": (1, 12),
    "dudi-qwen2.5-0.5b-from-3b": (1, 24),
    "dudi-qwen2.5-0.5b-from-sea-lion-8b": (1, 80),
    "dudi-qwen2.5-1.5b-from-14b-8gpu": (8, 80),
    "dudi-qwen3-1.7b-from-8b": (1, 80),
    "sft": (1, 24),
    "teacher-from-scratch": (1, 24),
    "teacher-qwen2.5-3b": (8, 80),
}
LOSSES = {
    "off_policy_weight": "off_policy_loss",
    "on_policy_weight": "on_policy_loss",
    "preference_weight": "preference_loss",
    "ce_weight": "ce_loss",
}


def run(folder: Path | None, *words: str, config: Path = PAPER) -> int:
    where = [] if folder is None else ["--output_dir", str(folder)]
    return cli.main(["train", "--config", str(config), "--miniature", *where, *words])


def without(value: Any, *names: str) -> Any:
    return {k: v for k, v in value.items() if k not in names}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_as_a_miniature(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where a recipe's own output_dir would be
    folder, recipe = tmp_path / "out", read_config_file(path)
    assert run(folder, config=path) == 0
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    steps = [record for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record]
    assert len(steps) == 2
    defaults = {name: getattr(DuDiConfig, name) for name in LOSSES}
    for step in steps:
        assert math.isfinite(step["loss"])
        for weight, loss in LOSSES.items():
            on = recipe.get(weight, defaults[weight]) > 0
            assert math.isfinite(step[loss]) if on else loss not in step
    info = json.loads((folder / "run.json").read_text())
    config = info["config"] | info["script"]
    for name, value in recipe.items():
        if name == "weight_schedules":
            for weight, schedule in value.items():
                assert without(config[name][weight], "steps") == without(schedule, "steps")
        elif name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            wanted = without(value, "attn_implementation")
            assert without(config[name], "attn_implementation") == wanted
        elif name not in MAY_DIFFER:
            assert config[name] == value, name
    told = capsys.readouterr().out
    assert "A miniature of this recipe" in told
    assert ("one tokenizer" in told) + ("two tokenizers" in told) + ("heads of two" in told) == (
        info["teacher_parameters"] is not None
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_gpu(path: Path, tmp_path: Path) -> None:
    options = read_config_file(path)
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        if name in options:
            options[name] = full_size.write(options[name], tmp_path)
    if "model_config" in options:
        options["model_config"]["vocab_size"] = GEMMA3.tokens
    gpus, memory = MADE_FOR[path.stem]
    plan = plan_run(*read_options(options), gpus=gpus, gpu_memory=memory)
    assert plan.fits, f"{plan.peak.bytes / 2**30:.1f} GiB"


def test_recipes_say_what_they_are_for() -> None:
    for path in RECIPES:
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert any(f"of {size} GB" in head for size in (12, 24, 80))
        assert f"dudi train --config configs/{path.name} --miniature" in " ".join(head.split())
        assert "Not yet run at full size" in " ".join(head.replace("#", " ").split())


# ---- where it runs, what it leaves ---------------------------------------------------------------


def test_nothing_is_left_without_an_output_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(None, config=CONFIGS / "sft.yaml") == 0
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert left <= {"dudi"}  # what the process keeps of datasets until it ends
    assert not list(tmp_path.glob("dudi-miniature-*"))
    assert "cross-entropy: " in capsys.readouterr().out


def test_a_base_model_needs_the_tokenizer_that_the_recipe_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model_name_or_path", "Qwen/Qwen2.5-0.5B"]
    assert run(tmp_path / "refused", *base) == 2
    assert "reference must not be 'teacher'" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    instruct = ["--tokenizer_name_or_path", "Qwen/Qwen2.5-0.5B-Instruct"]
    assert run(tmp_path / "run", *base, *instruct, "--max_steps", "9", "--logging_steps", "9") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be in [1"),
        (["--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path './nowhere' does not exist"),
        (["--verbalizer_templates", "{jv: '{{ x'}"], "language 'jv' is not valid jinja2"),
        (["--dataset_name", "null"], "dataset_name must be given"),
        (["--model_config", "{model_type: llama}"], "exactly one of model_name_or_path"),
        (
            ["--teacher_model_name_or_path", "null", "--teacher_url", "http://localhost:1"],
            "teacher_model_name_or_path must be given with teacher_url",
        ),
    ],
)
def test_mistakes_of_a_recipe_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(tmp_path / "run", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_an_output_dir_with_something_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert run(tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_signal_without_a_loss_is_told() -> None:
    config = DuDiConfig(output_dir="x", report_to="none", use_cpu=True)
    good = {"off_policy_loss": 1.0, "on_policy_loss": 1.0, "preference_loss": 1.0}
    check_signals(config, [good, good])
    with pytest.raises(ValueError, match=r"on_policy_weight is 1\.0, but its losses are \[1\.0, N"):
        check_signals(config, [good, without(good, "on_policy_loss")])
    with pytest.raises(ValueError, match="must take 2 steps, it took 1"):
        check_signals(config, [good])


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_type", "rows", "tied"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", "qwen2", 151_936, True),
        ("Qwen/Qwen2.5-32B", "qwen2", 152_064, False),
        ("Qwen/Qwen3-8B", "qwen3", 151_936, False),
        ("google/gemma-3-270m-it", "gemma3_text", 262_144, True),
        ("google/gemma-3-27b-pt", "gemma3", 262_208, True),
        ("meta-llama/Llama-3.2-1B", "llama", 128_256, True),
    ],
)
def test_names_that_are_known(name: str, model_type: str, rows: int, tied: bool) -> None:
    found = known(name)
    assert found is not None
    assert (found.model_type, found.head_rows, found.tied) == (model_type, rows, tied)


def test_names_that_are_not_known() -> None:
    for name in ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen2.5-30B", "google/gemma-3n-E4B-it", "gpt2"):
        assert known(name) is None


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"num_attention_heads": 32, "num_key_value_heads": 8}),
        ("gemma2", {"final_logit_softcapping": 30.0, "num_hidden_layers": 26}),
        ("gemma3_text", {"sliding_window": 512, "num_hidden_layers": 26}),
        ("qwen3", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}),
        ("qwen3_moe", {}),
        ("gpt_neox", {}),
        ("gpt2", {}),
    ],
)
def test_a_small_model_of_the_same_architecture(model_type: str, settings: dict[str, Any]) -> None:
    big = AutoConfig.for_model(model_type, **settings)
    small = type(big).from_dict(cut(big, 64, {"vocab_size": 300, "pad_token_id": 0}))
    assert small.model_type == model_type and small.hidden_size == 64
    assert small.tie_word_embeddings == big.tie_word_embeddings
    softcap = "final_logit_softcapping"
    assert getattr(small, softcap, None) == getattr(big, softcap, None)
    groups = getattr(big, "num_key_value_heads", None)
    if groups is not None:
        wanted = max(1, round(4 * groups / big.num_attention_heads))
        assert (small.num_attention_heads, small.num_key_value_heads) == (4, wanted)
    assert set(getattr(small, "layer_types", None) or ()) == set(
        getattr(big, "layer_types", None) or ()
    )
    model = AutoModelForCausalLM.from_config(small).eval()
    assert sum(p.numel() for p in model.parameters()) < 400_000
    LMHead.check(model)


def test_a_folder_s_own_configuration(tmp_path: Path) -> None:
    tiny.model(0, vocab=152_064, width=8).save_pretrained(tmp_path)
    found = original(str(tmp_path), "model_name_or_path")
    assert (found.config.model_type, found.family, found.padding) == ("llama", QWEN2_5, 399)
    assert found.chats
    tiny.model(0, vocab=777, width=8).save_pretrained(tmp_path)
    assert original(str(tmp_path), "model_name_or_path").family.name == "of 777"


def test_a_head_without_rows_for_special_tokens() -> None:
    """Gemma-3's text models: their tokenizer has one special token more than rows."""
    gemma = recipes.small_tokenizer(GEMMA3, True)
    qwen = recipes.small_tokenizer(QWEN2_5, True)
    rows = len(gemma) - 1
    shorter = Verbalizer.from_tokenizers(qwen, gemma, student_size=rows)
    whole = Verbalizer.from_tokenizers(qwen, gemma)
    assert (shorter.student_size, whole.student_size) == (rows, rows + 1)
    assert torch.equal(shorter.teacher_ids, whole.teacher_ids)
    assert torch.equal(shorter.indptr, whole.indptr[:-1]) and shorter.indptr[-1] == len(
        whole.teacher_ids
    )
    back = Verbalizer.from_tokenizers(gemma, qwen, teacher_size=rows)
    assert back.teacher_size == rows
    with pytest.raises(ValueError, match=rf"teacher ids in \[0, {rows}\), got {rows}"):
        Verbalizer.from_tokenizers(gemma, qwen, teacher_size=rows, specials={rows: 0})
    with pytest.raises(ValueError, match=f"student_size must be at least {rows}, got {rows - 1}"):
        Verbalizer.from_tokenizers(qwen, gemma, student_size=rows - 1)


# ---- options and data ----------------------------------------------------------------------------


def make(folder: Path, **more: Any) -> recipes.Miniature:
    return recipes.miniature(read_config_file(PAPER) | more, folder)


def test_one_process_and_a_live_teacher_stand_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"fsdp_size": 8, "teacher_cache": "cache"}
    made = make(tmp_path, **given)
    assert not given.keys() & made.options.keys() and made.teacher is not None
    assert all(made.changes[name] == (value, None) for name, value in given.items())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path / "run") == 2
    assert "miniature must run in one process" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_what_only_a_gpu_can_do(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(recipes, "is_flash_attn_2_available", lambda: gpu)
    flash = {"attn_implementation": "flash_attention_2"}
    given = {"tf32": True, "fp16": True, "optim": "paged_adamw_8bit", "bf16": False}
    placed = flash | {"load_in_4bit": True, "device_map": "auto"}
    options = make(tmp_path, model_init_kwargs=flash, teacher_model_init_kwargs=placed, **given)
    found = {name: options.options[name] for name in (*given, "model_init_kwargs")}
    if gpu:
        assert found == given | {"model_init_kwargs": flash} and "use_cpu" not in options.options
    else:
        assert found == {
            "tf32": None,
            "fp16": False,
            "optim": "adamw_torch",
            "bf16": False,
            "model_init_kwargs": {"attn_implementation": "sdpa"},
        }
        assert options.options["use_cpu"] is True
    kwargs = options.options["teacher_model_init_kwargs"]
    assert kwargs.keys() == {"attn_implementation"}


def test_rows_are_like_the_recipe_s_own(tmp_path: Path) -> None:
    data = tmp_path / "sea.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b", "language": "id"}) + "\n")
    made = make(tmp_path / "m", dataset_name=str(data), lexicon="words.tsv")
    rows = read_jsonl(Path(made.options["dataset_name"]))
    assert all(row.keys() == {"prompt", "completion", "language"} for row in rows)
    assert all(isinstance(row["prompt"], str) for row in rows)
    languages = {row["language"] for row in rows}
    assert read_lexicon(made.options["lexicon"], languages)
    assert made.changes["lexicon"] == ("words.tsv", made.options["lexicon"])


def test_rows_have_what_templates_may_show(tmp_path: Path) -> None:
    rows = few_rows("train", {"jv", "id"})
    assert {"jv", "id", "th"} <= {row["language"] for row in rows}
    wanted = {"prompt", "completion", "language", "pivot_prompt", "pivot_completion"}
    assert all(row.keys() == wanted | {"privileged_context"} for row in rows)
    assert all(row["pivot_prompt"] != row["prompt"][0]["content"] for row in rows)
    assert like(rows, None) == rows
    assert first_row("user/dataset") is None
    (tmp_path / "x.jsonl").write_text("{")
    with pytest.raises(ValueError, match="its first row, must hold JSON"):
        first_row(str(tmp_path / "x.jsonl"))
    assert len(read_lexicon(write_lexicon(tmp_path / "words.tsv"))) > 20


def test_names_of_tokenizers_decide_about_ends() -> None:
    """An instruct model ends turns with another token than its base; Gemma's EOS ends no turn."""
    chat, base = (recipes.small_tokenizer(QWEN2_5, chats) for chats in (True, False))
    assert chat.get_vocab() == base.get_vocab() and chat.eos_token_id != base.eos_token_id
    gemma = recipes.small_tokenizer(GEMMA3, True)
    turn = gemma.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert gemma.eos_token not in turn and "<end_of_turn>" in turn


def test_heads_are_padded_as_the_originals_are(tmp_path: Path) -> None:
    made = make(tmp_path)
    student = load_tokenizer(made.options["tokenizer_name_or_path"], "student")
    assert student.get_vocab() == tiny.tokenizer().get_vocab()
    config = AutoConfig.from_pretrained(made.options["model_name_or_path"])
    assert config.vocab_size - len(student) == 151_936 - 151_665
    assert made.options["output_dir"] == "runs/dudi-qwen2.5-0.5b"  # run_miniature's affair
