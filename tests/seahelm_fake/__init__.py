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
LANGUAGES = ("id", "th", "tl")
PHENOMENA = ["scalar_implicatures", "presuppositions"]


def _task(
    folder: str, competency: str, metric: str, languages: Any = LANGUAGES, **more: Any
) -> dict[str, Any]:
    """A config.yaml's entry; `labels` (by language) are the stand-in's data."""
    labels = more.pop("labels", dict.fromkeys(LANGUAGES, 0))
    known = languages if isinstance(languages, str) else {code: {} for code in languages}
    told = {"competency": competency, "metric": metric, "languages": known, "labels": labels}
    return {"folder": folder, **told, **more}


def _choice(folder: str, competency: str, n: Any, languages: Any = LANGUAGES, **more: Any) -> Any:
    labels = n if isinstance(n, dict) else dict.fromkeys(LANGUAGES, n)
    return _task(folder, competency, "normalized_accuracy", languages, labels=labels, **more)


def _judged(folder: str, competency: str, languages: Any) -> dict[str, Any]:
    return _task(folder, competency, "average_criteria_score", languages, use_judges=True)


METRICX = "normalized_metricx_wmt24_scores"
GROUPED: dict[str, Any] = {"aggregation_group": "translations", "use_judges": True}
LINDSEA, EXAM = "linguistic-diagnostics", {"aggregation_group": "thai_exam"}
TASKS = {
    "sentiment": _choice("nlu/sentiment", "nlu", 3),
    "qa": _task("nlu/qa", "nlu", "normalized_f1", ["id", "th"]),
    "belebele-qa-mc": _choice("nlu/belebele", "nlu", 4, ["tl"]),
    "metaphor": _choice("nlu/metaphor", "nlu", 2, ["id"]),
    "toxicity": _choice("safety/tox", "safety", {"id": 3, "th": 2, "tl": 2}),
    "translation-en-xx": _task("nlg/translation", "nlg", METRICX, **GROUPED),
    "translation-xx-en": _task(
        "nlg/translation", "nlg", METRICX, "${translation-en-xx.languages}", **GROUPED
    ),
    "abssum": _task("nlg/abssum", "nlg", "normalized_rougel_f1"),
    "causal": _choice("nlr/causal", "nlr", 2),
    "nli": _choice("nlr/nli", "nlr", 3),
    "if-eval": _task("if/ifeval", "instruction-following", "overall_lang_normalized_acc"),
    "mt-bench-judge": _judged("multi_turn/mt_bench_judge", "multi-turn", LANGUAGES),
    "kalahi-mc": _choice("cultural/kalahi", "cultural", 4, ["tl"]),
    "kalahi-judge": _judged("cultural/kalahi_judge", "cultural", ["tl"]),
    "global_mmlu_lite": _choice("knowledge/mmlu", "knowledge", 4, ["id", "tl"]),
    "thai_exam_onet": _choice("knowledge/thai_exam", "knowledge", 5, ["th"], **EXAM),
    "thai_exam_ic": _choice("knowledge/thai_exam", "knowledge", 4, ["th"], **EXAM),
    "syntax-criteria": _judged("lindsea/criteria", LINDSEA, ["id"]),
    "mp-r": _choice("lindsea/syntax", LINDSEA, 2, ["id"]),
    "pragmatic-single": _choice("lindsea/pragmatics", LINDSEA, 2, ["id"], phenomena=PHENOMENA[:1]),
    "pragmatic-pair": _choice("lindsea/pragmatics", LINDSEA, 2, ["id"], phenomena=PHENOMENA),
}


def make_checkout(folder: Path) -> Path:
    """A folder that looks and runs like a checkout of SEA-HELM."""
    (folder / "src").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("entry.py"), folder / "src" / "seahelm_evaluation.py")
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "base_model.jinja").write_text("{{ messages }}")
    (folder / "pyproject.toml").write_text('[project]\nname = "seahelm"\nversion = "1.2.0"\n')
    configs: dict[str, dict[str, Any]] = {}
    for name, task in TASKS.items():
        config = {key: value for key, value in task.items() if key != "folder"}
        configs.setdefault(task["folder"], {})[name] = config
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
