"""Methods as configurations of one trainer, read from data/ablation/methods.yaml; a grid may add
others that change some options of one of these (`like`).

What a method leaves unsaid is off: signals have weight 0, the teacher reads the student's prompt.
"steps" and "steps / 4" in a recipe are made of the run's own number of steps.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from dudi.config import WEIGHTS, DuDiConfig, ScriptArguments, checked, field_types, nearest
from dudi.demo_data import data_path

# What a cell gives the trainer by itself; the rest of a method or of `training` is anybody's.
GIVEN = (
    "model_name_or_path", "model_config", "tokenizer_name_or_path", "teacher_model_name_or_path",
    "teacher_model_init_kwargs", "teacher_tokenizer_name_or_path", "dataset_name", "dataset_config",
    "dataset_train_split", "dataset_test_name", "dataset_test_split", "output_dir", "seed",
    "max_steps", "num_train_epochs", "resume", "overwrite",
)  # fmt: skip
OFF: dict[str, Any] = dict.fromkeys(WEIGHTS, 0.0) | {"context_verbalizer": False}
START = "start"  # the warm start itself, which every method begins from
OF_STEPS = re.compile(r"steps(?: / (\d+))?")
SAME_TEXT = "same_text"  # of vocabulary_verbalizer: only tokens of the very same bytes


class Method(BaseModel):
    """One method; `options` are those of `dudi train`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    about: str
    options: dict[str, Any]
    paper: str | None = None  # arXiv
    data: Literal["given", "teacher"] = "given"  # who wrote y+
    one_epoch: bool = False  # all samples are drawn at the start: rows must not come again
    other_tokenizer: bool = False  # says something only where the teacher has one
    tuned_as: str | None = None  # only that one's learning rate and the next ones are tried
    cost: float = Field(gt=0)  # seconds a step of 16 rows on a core, for estimates

    def resolved(self, steps: int) -> dict[str, Any]:
        """Options of a run of so many steps."""
        return OFF | {name: _of_steps(value, steps) for name, value in self.options.items()}

    @property
    def needs_teacher(self) -> bool:
        """Whether the trainer loads one."""
        weights = ("off_policy_weight", "on_policy_weight")
        return any(self.options.get(name, 0) > 0 for name in weights)


class Variant(BaseModel):
    """A method that changes some options of another one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    like: str
    options: dict[str, Any]
    title: str | None = None
    tuned_as: str | None = None  # as of a method; without it, all rates are tried

    def method(self, name: str) -> Method:
        """Raises ValueError where `like` is no method, or an option none of `dudi train`'s."""
        base = method(self.like, f"methods.{name}.like")
        check_options(f"methods.{name}.options", self.options, (*GIVEN, "learning_rate"))
        told = ", ".join(f"{option} {value}" for option, value in self.options.items())
        update = {
            "title": self.title or name,
            "about": f"{base.title} with {told}." if told else base.about,
            "options": base.options | self.options,
            "tuned_as": self.tuned_as,
            "paper": None,
        }
        return base.model_copy(update=update)


def with_variants(variants: Mapping[str, Variant]) -> dict[str, Method]:
    """All methods and these, of different names and titles."""
    taken = sorted({START, *methods()} & variants.keys())
    if taken:
        raise ValueError(f"methods must have names of their own, got {', '.join(taken)}")
    found = methods() | {name: own.method(name) for name, own in variants.items()}
    titles = [own.title for own in found.values()]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice is not None:
        raise ValueError(f"methods must have titles of their own, got {twice!r} twice")
    return found


def check_options(place: str, options: Mapping[str, Any], given: Sequence[str]) -> None:
    """Raises ValueError for what is no option of `dudi train`, and for one that would be given
    another value."""
    for name in options:
        if name in given:
            raise ValueError(f"{place} must leave {name} to the grid, got {options[name]!r}")
    known = field_types(ScriptArguments) | field_types(DuDiConfig)
    try:
        checked({name: _of_steps(value, 1) for name, value in options.items()}, known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def _of_steps(value: Any, steps: int) -> Any:
    if isinstance(value, dict):
        return {name: _of_steps(own, steps) for name, own in value.items()}
    found = OF_STEPS.fullmatch(value) if isinstance(value, str) else None
    return value if found is None else max(1, steps // int(found[1] or 1))


@lru_cache(maxsize=1)
def methods() -> dict[str, Method]:
    """All methods by name, in the order of reports."""
    content = yaml.safe_load(data_path("ablation/methods.yaml").read_text(encoding="utf-8"))
    return {name: Method.model_validate(own) for name, own in content.items()}


def method(name: str, place: str = "method") -> Method:
    """Raises ValueError for a name of none."""
    check_among(place, name, methods())
    return methods()[name]


def check_among(place: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(
            f"{place} must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
        )
