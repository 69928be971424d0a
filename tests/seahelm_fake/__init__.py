"""SEA-HELM as the tests have it: a checkout that runs, and result files made by hand.

Both follow what the public repository reads and writes at v1.2.1 (src/seahelm_evaluation.py,
src/aggregate_metrics.py, src/metrics/*.py, seahelm_tasks/**/config.yaml); none of its code is here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

TIME = "2026-01-02T03:04:05.000001"
# task: folder, competency, metric, languages (with the number of labels), more
TASKS: dict[str, tuple[str, str, str, Any, dict[str, Any]]] = {
    "sentiment": ("nlu/sentiment", "nlu", "normalized_accuracy", {"id": 3, "tl": 3}, {}),
    "qa": ("nlu/qa", "nlu", "normalized_f1", {"id": 0, "tl": 0}, {}),
    "belebele-qa-mc": ("nlu/belebele", "nlu", "normalized_accuracy", {"tl": 4}, {}),
    "metaphor": ("nlu/metaphor", "nlu", "normalized_accuracy", {"id": 2}, {}),
    "toxicity": ("safety/tox", "safety", "normalized_accuracy", {"id": 3, "tl": 2}, {}),
    "translation-en-xx": (
        "nlg/translation", "nlg", "normalized_metricx_wmt24_scores", {"id": 0, "tl": 0},
        {"aggregation_group": "translations", "use_judges": True},
    ),
    "translation-xx-en": (
        "nlg/translation", "nlg", "normalized_metricx_wmt24_scores",
        "${translation-en-xx.languages}",
        {"aggregation_group": "translations", "use_judges": True},
    ),
    "abssum": ("nlg/abssum", "nlg", "normalized_rougel_f1", {"id": 0, "tl": 0}, {}),
    "causal": ("nlr/causal", "nlr", "normalized_accuracy", {"id": 2, "tl": 2}, {}),
    "nli": ("nlr/nli", "nlr", "normalized_accuracy", {"id": 3, "tl": 3}, {}),
    "if-eval": (
        "instruction_following/ifeval", "instruction-following", "overall_lang_normalized_acc",
        {"id": 0, "tl": 0}, {},
    ),
    "kalahi-mc": ("cultural/kalahi", "cultural", "normalized_accuracy", {"tl": 4}, {}),
    "global_mmlu_lite": ("knowledge/mmlu", "knowledge", "normalized_accuracy", {"tl": 4}, {}),
}  # fmt: skip


def make_checkout(folder: Path) -> Path:
    """A folder that looks and runs like a checkout of SEA-HELM."""
    (folder / "src").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("entry.py"), folder / "src" / "seahelm_evaluation.py")
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "base_model.jinja").write_text("{{ messages }}")
    (folder / "pyproject.toml").write_text('[project]\nname = "seahelm"\nversion = "1.2.0"\n')
    configs: dict[str, dict[str, Any]] = {}
    for name, (place, competency, metric, languages, more) in TASKS.items():
        configs.setdefault(place, {})[name] = {
            "competency": competency,
            "metric": metric,
            "languages": languages,
            "labels": languages,
            **more,
        }
    for place, tasks in configs.items():
        path = folder / "seahelm_tasks" / place / "config.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(tasks, sort_keys=False))
    (folder / "seahelm_tasks" / "task_config.yaml").write_text("seahelm:\n  id: [sentiment]\n")
    return folder


# ---- results by hand -----------------------------------------------------------------------------


def accuracy(percent: float, n_options: int) -> dict[str, Any]:
    """As F1AccMetric has it."""
    chance = 100 / n_options
    return {
        "accuracy": percent,
        "macro_f1": percent - 1,
        "null_weighted_f1": percent - 2,
        "normalized_accuracy": 100 * max(0.0, (percent - chance) / (100 - chance)),
        "null_count": 0,
    }


def metricx(error: float) -> dict[str, Any]:
    return {
        "metricx_wmt24_scores": error,
        "normalized_metricx_wmt24_scores": 100 * (25 - error) / 25,
        "null_count": 0,
    }


def sample() -> dict[str, Any]:
    """Indonesian: 46.67 (nlu), 45 (nlg), 50 (lindsea), 64; Thai: 40 (safety), 22.5 (knowledge)."""
    return {
        "id": {
            "nlu": {
                "sentiment": accuracy(60, 3),  # 40
                "qa": {"exact_match": 31.0, "f1": 50.0, "normalized_f1": 50.0, "null_count": 0},
                "metaphor": accuracy(75, 2),  # 50
                "total": 140 / 3,
            },
            "nlg": {
                "translation-en-xx": {"inference_time_taken": [1.5], "is_cached": [False]}
                | metricx(5),  # 80
                "translation-xx-en": metricx(10),  # 60
                "abssum": {
                    "null_count": 0,
                    "rougel_precision": 22.0,
                    "rougel_recall": 19.0,
                    "rougel_f1": 20.0,
                    "normalized_rougel_f1": 20.0,
                },
                "translations": 70.0,
                "total": 45.0,
            },
            "linguistic-diagnostics": {
                "mp-r": {
                    "accuracy": 80.0,
                    "subcategories": {"negation": 80.0},
                    "normalized_accuracy": 60.0,
                },
                "pragmatic-single": {"subcategories": {"scalar_implicatures": [6, 10]}},
                "pragmatic-pair": {
                    "subcategories": {"scalar_implicatures": [8, 10], "presuppositions": [7, 10]}
                },
                "pragmatics": {"subcategories": {}, "accuracy": 70.0, "normalized_accuracy": 40.0},
                "lindsea": {"normalized_score": 50.0, "subcategories": {}},
                "total": 50.0,
            },
            "instruction-following": {
                "if-eval": {"overall_count": 105, "overall_lang_normalized_acc": 64.0},
                "total": 64.0,
            },
            "total": (140 / 3 + 45 + 50 + 64) / 4,
        },
        "th": {
            "safety": {"toxicity": accuracy(70, 2), "total": 40.0},
            "knowledge": {
                "thai_exam_onet": accuracy(40, 5),  # 25
                "thai_exam_ic": accuracy(40, 4),  # 20
                "thai_exam": 22.5,
                "total": 22.5,
            },
            "total": 31.25,
        },
        "total": ((140 / 3 + 45 + 50 + 64) / 4 + 31.25) / 2,
    }


def write_run(
    folder: Path,
    content: Any,
    *,
    model: str = "student",
    run: int = 0,
    seed: int | None = 7,
    time: str = TIME,
    tasks: dict[str, Any] | None = None,
    limit: int | None = None,
) -> Path:
    """The files of one run; without a seed, no configuration."""
    place = folder / model / f"run_{run}"
    for part in ("results", "configs"):
        (place / part).mkdir(parents=True, exist_ok=True)
    path = place / "results" / f"{model}_seahelm_results_{time}.json"
    text = content if isinstance(content, str) else json.dumps(content, indent=2)
    path.write_text(text, encoding="utf-8")
    if seed is not None:
        config = {
            "tasks": tasks or {},
            "seed": seed,
            "run_number": run,
            "run_env": {"seahelm_git_hash": "v1.2.1"},
            "run_args": {"limit": limit},
        }
        file = place / "configs" / f"{model}_run_config_{time}.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
