"""Evaluation by language: tasks, figures with intervals, comparisons.

from dudi.evaluation import compare, evaluate_tasks

result = evaluate_tasks(model, tokenizer, ["translation", "my-task.yaml"], teacher=teacher)
result.tasks["translation"].estimate("nll_per_char", "th")  # value, low, high
result.save("runs/first/tasks.json")
compare([result, other]).of("translation", "th")  # with paired differences
"""

from dudi.evaluation.bootstrap import Estimate
from dudi.evaluation.compare import Compared, Comparison, compare
from dudi.evaluation.figures import FIGURES
from dudi.evaluation.result import Result, TaskResult, load_result
from dudi.evaluation.task import Task, builtin_tasks, load_task
from dudi.evaluation.tasks import evaluate_tasks

__all__ = [
    "FIGURES", "Compared", "Comparison", "Estimate", "Result", "Task", "TaskResult",
    "builtin_tasks", "compare", "evaluate_tasks", "load_result", "load_task",
]  # fmt: skip
