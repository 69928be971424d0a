"""How the weight of a signal changes over a run: a pure function of the step, so that a resumed run
needs nothing restored.

    weight_schedules:
      on_policy_weight: {kind: warmup, steps: 200}  # from 0 to its weight
      off_policy_weight: {kind: linear, end: 0.2}   # to a fifth of its weight, at the last step
"""

from __future__ import annotations

from typing import Any, NamedTuple

KINDS = ("constant", "linear", "warmup")
FIELDS = ("kind", "steps", "end")


class Schedule(NamedTuple):
    kind: str = "constant"
    steps: int | None = None  # of the change; None: the whole run
    end: float = 0.0  # of linear: the last factor

    @classmethod
    def of(cls, name: str, given: Any) -> Schedule:
        """Raises ValueError or TypeError that names what is wrong."""
        if not isinstance(given, dict):
            raise TypeError(f"weight_schedules[{name!r}] must be a mapping, got {given!r}")
        for key in given:
            if key not in FIELDS:
                raise ValueError(
                    f"weight_schedules[{name!r}] must have no more than {', '.join(FIELDS)}, got "
                    f"{key!r}"
                )
        found = cls(**given)
        place = f"of weight_schedules[{name!r}]"
        if found.kind not in KINDS:
            raise ValueError(f"kind {place} must be one of {', '.join(KINDS)}, got {found.kind!r}")
        if found.steps is not None and (type(found.steps) is not int or found.steps < 1):
            raise ValueError(f"steps {place} must be at least 1, got {found.steps!r}")
        if type(found.end) not in (int, float) or not 0 <= found.end < float("inf"):
            raise ValueError(f"end {place} must be a factor of 0 or more, got {found.end!r}")
        return found

    def factor(self, step: int, max_steps: int) -> float:
        """Of the weight in the optimizer step of this number, counted from 0."""
        steps = max_steps if self.steps is None else self.steps
        match self.kind:
            case "linear":
                return 1 + (self.end - 1) * min(1.0, step / max(1, steps - 1))
            case "warmup":
                return min(1.0, (step + 1) / max(1, steps))
        return 1.0
