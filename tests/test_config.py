"""Configuration: what is refused, in which words, and that refusing leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dudi.checkpoints import check_output_dir
from dudi.config import (
    DuDiConfig,
    ScriptArguments,
    field_types,
    from_options,
    parse,
    read_words,
    resume_mismatches,
    to_public_dict,
)

BASE: dict[str, Any] = {
    "model_name_or_path": "student",
    "dataset_name": "data.jsonl",
    "report_to": "none",
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1e-4}, "lerning_rate.*did you mean 'learning_rate'"),
        ({"off_polcy_weight": 1}, "did you mean 'off_policy_weight'"),
        ({"off_policy_weight": "high"}, "off_policy_weight must be float, got 'high'"),
        ({"off_policy_weight": True}, "off_policy_weight must be float, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be float"),
        ({"max_steps": 1.5}, "max_steps must be int"),
        ({"verbalizer_templates": ["x"]}, "verbalizer_templates must be"),
        ({"preference_weight": -0.1}, r"preference_weight must be in \[0, inf\), got -0.1"),
        ({"ce_weight": float("nan")}, "ce_weight"),
        ({"off_policy_weight": 0, "on_policy_weight": 0, "preference_weight": 0}, "all signals"),
        ({"teacher_top_p": 0.0}, r"teacher_top_p must be in \(0, 1\], got 0.0"),
        ({"verbalized_share": 1.5}, r"verbalized_share must be in \[0, 1\], got 1.5"),
        ({"teacher_temperature": 0.0}, r"teacher_temperature must be in \(0, inf\), got 0.0"),
        ({"max_unpaired": -1.0}, r"max_unpaired must be in \[0, 1\], got -1.0"),
        ({"unmatched": "bukket"}, "unmatched must be one of .*did you mean 'bucket'"),
        ({"lexicon_kind": "x"}, "lexicon_kind must be one of lexicon, concepts, got 'x'"),
        (
            {"teacher_skip_tokens": 9, "max_completion_length": 9},
            "teacher_skip_tokens must be less than max_completion_length=9, got 9",
        ),
        (
            {"teacher_top_p": 0.5, "reference": "teacher"},
            "teacher_top_p must be 1 with reference='teacher', got 0.5",
        ),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"beta": 0, "off_policy_divergence": "jsd"}, "strictly between 0 and 1"),
        ({"alpha": 0, "on_policy_divergence": "skew_reverse_kl"}, "alpha must be strictly"),
        ({"off_policy_divergence": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"reference": "inital"}, "did you mean 'initial'"),
        ({"bad_rows": "drop"}, "bad_rows must be one of error, skip, got 'drop'"),
        ({"overlong": "cut"}, "overlong must be one of truncate, drop"),
        ({"temperature": 0}, r"temperature must be in \(0, inf\)"),
        ({"rollout_temperature": -1}, "rollout_temperature"),
        ({"gradient_tolerance": 2}, r"gradient_tolerance must be in \[0, 1\]"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"preference_length_power": 2}, "preference_length_power must be 0 or 1, got 2"),
        ({"reference_sync_steps": 0}, "reference_sync_steps"),
        ({"max_completion_length": None}, "max_completion_length must be a number"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}},
            "cross_entropy of liger_kernel_config must be False",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"torch_compile": True}, "torch_compile"),
        ({"deepspeed": "zero2.json"}, "DeepSpeed is not supported"),
        ({"fsdp": True}, "FSDP is not supported.*fsdp_size=auto"),
        ({"fsdp_size": 1}, r"fsdp_size must be in \[2, inf\)"),
        ({"fsdp_size": "all"}, "fsdp_size must be Union"),
        ({"fsdp_size": 2, "fp16": True}, "fp16 must be false with fsdp_size"),
        ({"fsdp_size": 2, "optim": "adafactor"}, "optim must be one of adamw_torch,.*'adafactor'"),
        ({"train_sampling_strategy": "group_by_length"}, "must be random or sequential"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type.*did you mean 'cosine'"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"output_dir": 5}, "output_dir must be str"),
        ({"lora_r": 0}, "lora_r"),
        ({"model_config": {"model_type": "llama"}}, "exactly one of model_name_or_path"),
        ({"dataset_name": None}, "dataset_name must be given"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"output_dir": None}, "output_dir must be given"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        from_options({**BASE, "output_dir": str(tmp_path / "run"), **options})
    assert not list(tmp_path.iterdir())


def test_python_keyword_is_checked_too() -> None:
    misspelt: dict[str, Any] = {"on_policy_wieght": 1.0}
    with pytest.raises(TypeError, match="did you mean 'on_policy_weight'"):
        DuDiConfig(output_dir="x", **misspelt)


def test_yaml_and_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 5e-5\nmodel_name_or_path: student\ndataset_name: d.jsonl\nreport_to: none\n"
        "verbalizer_templates:\n  th: '{{ prompt }}'\n"
    )
    words = ["--output-dir", str(tmp_path / "run"), "--max_steps=3", "--log_completions"]
    words += ["--model_init_kwargs", "{dtype: bfloat16}"]
    script, config = parse(str(recipe), words)
    assert script.dataset_name == "d.jsonl"
    assert (config.learning_rate, config.max_steps, config.log_completions) == (5e-5, 3, True)
    assert config.model_init_kwargs == {"dtype": "bfloat16"}
    assert config.verbalizer_templates == {"th": "{{ prompt }}"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--run-name", "007"], "run_name", "007"),
        (["--run_name=off"], "run_name", "off"),
        (["--beta", "1e-1"], "beta", 0.1),
        (["--max_prompt_length", "null"], "max_prompt_length", None),
        (["--max_prompt_length", "None"], "max_prompt_length", None),
        (["--no-such", "1"], "no_such", 1),
        (["--lr_scheduler_kwargs", "{min_lr: 1e-6}"], "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        (["--learning_rate", "-1"], "learning_rate", -1),
        (["--bf16", "--seed", "3"], "bf16", True),
        (["--stop_strings", "x, no"], "stop_strings", ["x", "no"]),
        (["--stop_strings", "['a,b']"], "stop_strings", ["a,b"]),
        (["--stop_strings", "null"], "stop_strings", None),
        (["--lora_target_modules", "q,k"], "lora_target_modules", "q,k"),  # a name or a pattern
    ],
)
def test_words_of_the_command_line(words: list[str], name: str, value: Any) -> None:
    wanted = field_types(ScriptArguments) | field_types(DuDiConfig)
    assert read_words(words, wanted)[name] == value


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engine_chosen_by_the_launcher(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match="not supported"):
        DuDiConfig(output_dir="x", report_to="none")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "must hold a mapping")]
)
def test_bad_recipe_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(str(tmp_path / "r.yaml"), [])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        parse(str(tmp_path / "nowhere.yaml"), [])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("forward_kl", "forward_kl", 0.5)),
        ({"beta": 0}, ("forward_kl", "forward_kl", 0.0)),
        ({"beta": 1}, ("reverse_kl", "reverse_kl", 1.0)),
        ({"beta": 0.3}, ("jsd", "jsd", 0.3)),
        ({"beta": 0.3, "on_policy_divergence": "reverse_kl"}, ("jsd", "reverse_kl", 0.3)),
        ({"off_policy_divergence": "jsd"}, ("jsd", "forward_kl", 0.5)),
        ({"off_policy_divergence": "adaptive_kl"}, ("adaptive_kl", "forward_kl", 0.5)),
    ],
)
def test_divergences_from_beta(options: dict[str, Any], expected: tuple[str, str, float]) -> None:
    config = DuDiConfig(output_dir="x", report_to="none", **options)
    assert config.kd_divergences == expected


def test_needs() -> None:
    def needs(**weights: Any) -> tuple[bool, bool]:
        off = {"off_policy_weight": 0, "on_policy_weight": 0, "preference_weight": 0}
        config = DuDiConfig(output_dir="x", report_to="none", **(off | weights))
        return config.needs_samples, config.needs_teacher

    assert needs(ce_weight=1) == (False, False)
    assert needs(off_policy_weight=1) == (False, True)
    assert needs(on_policy_weight=1) == (True, True)
    assert needs(preference_weight=1) == (True, False)
    assert needs(preference_weight=1, reference="teacher") == (True, True)


def test_output_dir(tmp_path: Path) -> None:
    check_output_dir(tmp_path / "new" / "run", resume=False, overwrite=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file", resume=False, overwrite=True)
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        check_output_dir(tmp_path, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="holds no run"):
        check_output_dir(tmp_path, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        check_output_dir(tmp_path / "absent", resume=True, overwrite=False)
    (tmp_path / "run.json").write_text('{"config": {}, "environment": {}}')
    check_output_dir(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "file").exists()  # checking deletes nothing
    (tmp_path / ".git").mkdir()
    with pytest.raises(ValueError, match="holds more than a run"):
        check_output_dir(tmp_path, resume=False, overwrite=True)


def test_output_dir_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="can't be written"):
        check_output_dir("/proc/dudi/run", resume=False, overwrite=False)


def test_resume_mismatches_ignore_what_may_change() -> None:
    def public(**options: Any) -> dict[str, Any]:
        return to_public_dict(DuDiConfig(output_dir="x", report_to="none", **options))

    free = public(save_steps=7, logging_steps=3, log_completions=True, memory_budget=10**9)
    assert resume_mismatches(public(), free) == []
    assert resume_mismatches(public(), public(seed=1, lr_scheduler_type="cosine")) == [
        "lr_scheduler_type was the default, is 'cosine'",
        "seed was the default, is 1",
    ]
