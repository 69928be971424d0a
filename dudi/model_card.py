"""The model card of an export: data/model_card.md.j2 filled with what the run's files tell.

The front matter (languages, licence, base model, data sets, evaluation) is huggingface_hub's
`ModelCardData`. A card is made to be published: of local folders and files it tells the last name,
never the path.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dudi.callbacks import checked_object
from dudi.evaluation.figures import FIGURES as FIGURES_OF_TASKS
from dudi.evaluation.result import Result
from dudi.models import looks_like_a_path
from dudi.report_figures import FIGURES, Figure, count, language_name, number, option

if TYPE_CHECKING:
    from dudi.export import Source

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILES = (".json", ".jsonl", ".csv", ".parquet", ".yaml")
ADAPTER_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
SETTINGS = (
    "off_policy_weight", "off_policy_divergence", "on_policy_weight", "on_policy_divergence",
    "preference_weight", "preference_loss", "reference", "preference_beta", "ce_weight", "beta",
    "temperature", "context_verbalizer", "vocabulary_verbalizer", "rollout_temperature",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "max_prompt_length",
    "max_completion_length", "seed",
)  # fmt: skip

ALL_FIGURES = (
    *FIGURES,
    *(
        Figure(key, f.title, f.unit, f.digits, f.better == "lower")
        for key, f in FIGURES_OF_TASKS.items()
        if f.better and key not in {figure.key for figure in FIGURES}
    ),
)


def is_hub_id(name: Any) -> bool:
    """Whether a name can be a Hub id, and is no file or folder here."""
    return (
        isinstance(name, str)
        and HUB_ID.fullmatch(name) is not None
        and not looks_like_a_path(name)
        and not name.endswith(FILES)
        and not Path(name).exists()
    )


def public(value: Any) -> str:
    """A setting as a card may show it: of a path, its last name."""
    if isinstance(value, str) and not is_hub_id(value) and ("/" in value or Path(value).exists()):
        return Path(value).name
    return option(value)


def read_evaluations(file: str | None, run: Path | None) -> dict[str, dict[str, Any]]:
    """Evaluations by name, as `dudi evaluate --output` and runs write them; none where none are."""
    path = Path(file).expanduser() if file else run / "evaluation.json" if run else None
    if path is None or (file is None and not path.exists()):
        return {}
    try:
        found = checked_object(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ValueError(f"evaluation {file!r} can't be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"evaluation {str(path)!r} must hold JSON: {error}") from error
    if "format" in found:
        return _of_tasks(Result.from_dict(found, f"evaluation {str(path)!r}"))
    for name, values in found.items():
        if not isinstance(values, dict) or not isinstance(values.get("languages"), dict):
            raise ValueError(
                f"{name!r} in evaluation {str(path)!r} must be an object with languages, as "
                "`dudi evaluate --output` writes it"
            )
    return found


def _of_tasks(result: Result) -> dict[str, dict[str, Any]]:
    """A result's tasks as evaluations by name, values alone."""
    return {
        name: {
            "task": name,
            "languages": {
                code: {
                    figure: own[code].value
                    for figure, own in task.figures.items()
                    if code in own and math.isfinite(own[code].value)
                }
                for code in task.languages
            },
        }
        for name, task in result.tasks.items()
    }


def _figures(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A table for each figure that was measured: a line a language, a column an evaluation."""
    tables = []
    for figure in ALL_FIGURES:
        lines = {}
        for code in dict.fromkeys(c for e in evaluations.values() for c in e["languages"]):
            values = [
                (e["languages"].get(code) or {}).get(figure.key) for e in evaluations.values()
            ]
            if any(v is not None for v in values):
                lines[code] = [number(v, figure.digits) for v in values]
        if lines:
            tables.append({"figure": figure, "lines": lines})
    return tables


def _results(evaluations: dict[str, dict[str, Any]], data: str) -> list[EvalResult]:
    """Of a run the last evaluation (after training), of tasks all, for the front matter."""
    if not evaluations:
        return []
    tasks = [e for e in evaluations.values() if "task" in e] or list(evaluations.values())[-1:]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=own.get("task") or (data if is_hub_id(data) else "held-out"),
            dataset_name=f"{own.get('task') or public(data)}, {language_name(code)}",
            dataset_config=code,
            metric_type=figure.key,
            metric_name=f"{figure.title} ({figure.unit})",
            metric_value=round(float(values[figure.key]), 5),
        )
        for own in tasks
        for code, values in own["languages"].items()
        for figure in ALL_FIGURES
        if isinstance(values.get(figure.key), (int, float)) and math.isfinite(values[figure.key])
    ]


def _read_run(run: Path | None) -> dict[str, Any]:
    if run is None:
        return {}
    return checked_object(
        json.loads((run / "run.json").read_text(encoding="utf-8")), str(run / "run.json")
    )


def _settings(options: dict[str, Any]) -> dict[str, str]:
    names = (*SETTINGS, *(ADAPTER_SETTINGS if options.get("use_peft") else ()))
    return {n: public(options[n]) for n in names if options.get(n) is not None}


def write_card(
    source: Source,
    model: Any,
    path: Path,
    *,
    license: str | None = None,
    base_model: str | None = None,
    evaluation: str | None = None,
) -> None:
    """Write the card of `model` to `path`; what is not known is left out of it."""
    info = _read_run(source.run)
    options = (info.get("script") or {}) | (info.get("config") or {})
    student = base_model or options.get("model_name_or_path")
    if student is None and source.adapter is not None:
        student = source.model
    data, teacher = options.get("dataset_name"), options.get("teacher_model_name_or_path")
    evaluations = read_evaluations(evaluation, source.run)
    tested = str(options.get("dataset_test_name") or data or "held-out text")
    languages = [code for code in info.get("languages") or [] if re.fullmatch(r"[a-z]{2,3}", code)]
    front = ModelCardData(
        language=languages or None,
        license=license or "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dudi", "distillation"] if teacher else ["dudi"],
        base_model=student if is_hub_id(student) else None,
        datasets=[str(data)] if is_hub_id(data) else None,
        model_name=source.name,
        eval_results=_results(evaluations, tested) or None,
    )
    card = ModelCard.from_template(
        front,
        template_str=_template(),
        name=source.name,
        info=info,
        student=public(student) if student else None,
        teacher=public(teacher) if teacher else None,
        merged=source.adapter is not None,
        data=public(data) if data else None,
        tested=public(tested),
        languages=[language_name(code) for code in info.get("languages") or []],
        parameters=count(sum(p.numel() for p in model.parameters())),
        dtype=str(model.dtype).removeprefix("torch."),
        settings=_settings(options),
        labels=list(evaluations),
        figures=_figures(evaluations),
        language_name=language_name,
    )
    path.write_text(str(card), encoding="utf-8")


def _template() -> str:
    loader = jinja2.PackageLoader("dudi", "data")
    return loader.get_source(jinja2.Environment(), "model_card.md.j2")[0]
