"""A stand-in for SEA-HELM's entry script: its options, the files it reads and writes, no models.

Like the real one it works in the folder that it is started in, finds tasks by globbing config.yaml
files, puts groups of tasks in the suite's place, writes the configuration first, the results again
after every task, and totals last. Scores are made of seed, language and task. To test what goes
wrong, FAKE_EXIT ends it half-way with that status, FAKE_ERROR names tasks that it can't evaluate.
"""

import argparse
import datetime
import glob
import hashlib
import json
import os
import sys
import zlib

import yaml


def follow(value, configs):
    while isinstance(value, str) and value.startswith("${"):
        task, key = value[2:-1].split(".")
        value = configs[task][key]
    return value


def read_tasks():
    configs: dict = {}
    groups: dict = {}
    for path in glob.glob("seahelm_tasks/**/config.yaml", recursive=True):
        with open(path, encoding="utf-8") as file:
            configs.update(yaml.safe_load(file))
    for name, config in configs.items():
        configs[name] = {key: follow(value, configs) for key, value in config.items()}
        if "aggregation_group" in configs[name]:
            groups.setdefault(configs[name]["aggregation_group"], []).append(name)
    return configs, groups


def figures(config, language, quality):
    """What the task's metric class returns, at a quality in [0, 1]."""
    metric = config["metric"]
    if "phenomena" in config:  # a part of LINDSEA's pragmatics: right answers, and questions
        return {"subcategories": {name: [round(10 * quality), 10] for name in config["phenomena"]}}
    if metric == "normalized_accuracy":
        chance = 1 / config["labels"][language]
        accuracy = chance + (1 - chance) * quality
        return {"accuracy": 100 * accuracy, "normalized_accuracy": 100 * quality, "null_count": 0}
    if metric == "normalized_metricx_wmt24_scores":
        return {"metricx_wmt24_scores": 25 - 25 * quality, metric: 100 * quality}
    if metric in ("normalized_f1", "normalized_rougel_f1"):
        return {metric.removeprefix("normalized_"): 100 * quality, metric: 100 * quality}
    return {metric: 100 * quality}


def aggregate_lindsea(entries):
    """Pragmatics by phenomenon over its parts, then with mp-r: what a judge adds is left out."""
    counts: dict = {}
    for part in ("pragmatic-single", "pragmatic-pair"):
        for name, (right, questions) in entries[part]["subcategories"].items():
            counts.setdefault(name, []).append((right, questions))
    shares = [sum(r for r, _ in c) / sum(n for _, n in c) for c in counts.values()]
    accuracy = sum(shares) / len(shares)
    normalized = 100 * max(2 * accuracy - 1, 0)
    entries["pragmatics"] = {"accuracy": 100 * accuracy, "normalized_accuracy": normalized}
    total = (entries["mp-r"]["normalized_accuracy"] + normalized) / 2
    entries["lindsea"] = {"normalized_score": total, "subcategories": {}}
    entries["total"] = total
    return total


def aggregate(results, configs):
    languages = []
    for competencies in results.values():
        totals = []
        for competency, entries in competencies.items():
            if competency == "linguistic-diagnostics":
                totals.append(aggregate_lindsea(entries))
                continue
            groups: dict = {}
            scores = []
            for name, entry in list(entries.items()):
                value = entry[configs[name]["metric"]]
                group = configs[name].get("aggregation_group")
                groups.setdefault(group, []).append(value) if group else scores.append(value)
            for group, values in groups.items():
                entries[group] = sum(values) / len(values)
                scores.append(entries[group])
            entries["total"] = sum(scores) / len(scores)
            totals.append(entries["total"])
        competencies["total"] = sum(totals) / len(totals)
        languages.append(competencies["total"])
    results["total"] = sum(languages) / len(languages)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", action="append", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--model_type", required=True)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--model_args")
    parser.add_argument("--is_base_model", action="store_true")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--run", type=int, default=0)
    args = parser.parse_args()
    configs, groups = read_tasks()
    with open("seahelm_tasks/task_config.yaml", encoding="utf-8") as file:
        suite = yaml.safe_load(file)[args.tasks[0]]
    with open(os.path.join(args.model_name, "config.json"), encoding="utf-8") as file:
        print("serving", json.load(file)["model_type"], args.model_args, flush=True)
    name = os.path.basename(args.model_name)
    folder = os.path.join(args.output_dir, name, f"run_{args.run}")
    for part in ("inferences", "results", "configs", "logs"):
        os.makedirs(os.path.join(folder, part), exist_ok=True)
    time = datetime.datetime.now().isoformat()
    told = {
        "tasks": {n: c for n, c in configs.items() if any(n in t for t in suite.values())},
        "seed": args.seed,
        "run_number": args.run,
        "run_env": {"seahelm_git_hash": "v1.2.1"},
        "run_args": {"model_name": args.model_name, "limit": args.limit},
    }
    with open(f"{folder}/configs/{name}_run_config_{time}.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(told, file)

    results: dict = {}
    for language, names in suite.items():
        for task in [t for n in names for t in groups.get(n, [n])]:
            config = configs[task]
            digest = hashlib.sha256(f"{args.seed} {language} {task}".encode()).digest()
            entry = figures(config, language, 0.2 + 0.6 * zlib.crc32(digest) / 2**32)
            if f"{language}/{task}" in os.environ.get("FAKE_ERROR", "").split():
                entry = {config["metric"]: 0, "error": "Failed to run evaluation for task"}
            results.setdefault(language, {}).setdefault(config["competency"], {})[task] = entry
            path = f"{folder}/results/{name}_seahelm_results_{time}.json"
            with open(path, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=2)
            if os.environ.get("FAKE_EXIT"):
                sys.exit(int(os.environ["FAKE_EXIT"]))
    aggregate(results, configs)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
