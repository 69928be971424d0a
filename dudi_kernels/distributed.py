"""Vocabulary-parallel losses: each rank sweeps over its slice of the vocabulary, for all rows.

What ranks tell one another is per row: log-sum-exps and target logits, then the sums that need
those of whole rows; or both at once where a divergence adds up by the chain rule (chain.py). Each
is one `all_gather` of a few numbers a row, reduced in the order of the ranks, so that all ranks
hold the same bits. Gradients of the head stay where they are; those of the hidden states are
summed over the ranks once, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from dudi_kernels.chain import put_together, settle, widened
from dudi_kernels.distributed_adaptive import set_mixture
from dudi_kernels.divergences import Measure
from dudi_kernels.shard import VocabularyShard, digest
from dudi_kernels.sweep import Needs, RowValues, Side, Sweep, Task, runs
from dudi_kernels.tiles import RowState

__all__ = ["Meeting", "ShardedSweep", "VocabularyShard", "agree_on", "new_sweep"]

STUDENT = ("log_sum", "tempered_log_sum", "target")
TEACHER = ("teacher_log_sum", "teacher_tempered_log_sum", "teacher_target")
SUMMED = ("divergence", "g_sum", "entropy", "teacher_entropy")
CHAINED = (*STUDENT, *TEACHER, "divergence", "entropy", "teacher_entropy", "poles")
WHO = ("student", "teacher")

Run = tuple[int, int, Measure | None]  # rows [start, stop) of one divergence, or of none


class Meeting:
    """Puts together what ranks have of a state's rows: afterwards all hold that of whole rows."""

    def __init__(self, shard: VocabularyShard, state: RowState):
        self.shard, self.state = shard, state

    def statistics(self, start: int, stop: int, *, student: bool, teacher: bool) -> None:
        """Log-sum-exps and target logits, which one rank has and the others hold 0 for."""
        names = STUDENT * student + TEACHER * teacher
        for name, found in self._gather(names, start, stop).items():
            together = found.sum(0) if name.endswith("target") else found.logsumexp(0)
            getattr(self.state, name)[start:stop] = together

    def sums(self, start: int, stop: int) -> None:
        """Divergence, sum of g and entropies, and who masks what the other gives mass."""
        for name, found in self._gather((*SUMMED, "poles"), start, stop).items():
            own = getattr(self.state, name)[start:stop]
            if name == "poles":
                own.copy_(_either(found))
            else:
                own.copy_(found.sum(0))

    def chained(self, rows: Sequence[Run]) -> None:
        """Both, of consecutive rows whose sums are those of each rank's tokens alone."""
        if not rows:
            return
        first, last = rows[0][0], rows[-1][1]
        gathered = self._gather(CHAINED, first, last)
        for start, stop, measure in rows:
            local = slice(start - first, stop - first)
            found = {name: values[:, local] for name, values in gathered.items()}
            self._chain(start, stop, measure, found)

    def _chain(
        self, start: int, stop: int, measure: Measure | None, found: dict[str, Tensor]
    ) -> None:
        state = self.state.rows(start, stop)
        fresh = RowState.fresh(state.weight)
        whole = widened(fresh)
        for rank in range(len(self.shard.bounds) - 1):
            own = {name: values[rank] for name, values in found.items()}
            own["poles"] = own["poles"].int()
            put_together(whole, replace(fresh, **own), measure)
        settle(state, whole, measure)
        for name in ("target", "teacher_target"):
            getattr(state, name).copy_(found[name].sum(0))
        for name in (*STUDENT[:2], *TEACHER[:2], "poles"):
            getattr(state, name).copy_(getattr(whole, name))

    def _gather(self, names: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        """(ranks, R) of each name, in the precision of log-sum-exps."""
        wide = self.state.log_sum.dtype
        own = torch.stack([getattr(self.state, name)[start:stop].to(wide) for name in names])
        found = self.shard.gather(own)
        return {name: found[:, i] for i, name in enumerate(names)}


def _either(found: Tensor) -> Tensor:
    """(R,) bits that any rank has set."""
    bits = torch.zeros_like(found[0], dtype=torch.int32)
    for own in found.int():
        bits.bitwise_or_(own)
    return bits


class ShardedSweep(Sweep):
    """*retain* on one rank: the logits of its tokens stay in its buffer while ranks meet."""

    def __init__(self, task: Task, backend: ModuleType):
        super().__init__(task, backend)
        shard = task.student.head.shard
        assert shard is not None
        self.shard, self.meeting = shard, Meeting(shard, self.state)
        self.mixes = False  # ranks do that together

    def run(self) -> RowValues:
        values = super().run()
        self.shard.sum_(self.grads.hidden, self.grads.low)
        return values

    def _steps(
        self,
        start: int,
        stop: int,
        *,
        statistics: bool = False,
        teacher: bool = True,
        late_teacher: bool = False,
        sums: bool = False,
        gradient: bool = False,
        columns: tuple[int, int] | None = None,
    ) -> None:
        """As one process does, with a meeting wherever the next step needs whole rows."""
        assert columns is None
        rows = runs(self.task.spans, start, stop)
        if statistics and teacher and sums and all(_chains(measure) for _, _, measure in rows):
            super()._steps(start, stop, statistics=True, sums=True)
            self.meeting.chained(rows)
        else:
            if statistics or late_teacher:
                super()._steps(
                    start, stop, statistics=statistics, teacher=teacher, late_teacher=late_teacher
                )
                guide = self.teacher is not None and (late_teacher or (statistics and teacher))
                self.meeting.statistics(start, stop, student=statistics, teacher=guide)
            if sums:
                self._mix(rows, start)
                super()._steps(start, stop, sums=True)
                self.meeting.sums(start, stop)
        if gradient:
            super()._steps(start, stop, gradient=True)

    def _mix(self, rows: Sequence[Run], first: int) -> None:
        """Each row's own a of an adaptive divergence."""
        for start, stop, measure in rows:
            if measure is not None and measure.adaptive:
                assert self.teacher is not None
                local = slice(start - first, stop - first)
                logits = self.student[local], self.teacher[local]
                set_mixture(self.shard, self.setting, self.state, logits, start)


def _chains(measure: Measure | None) -> bool:
    return measure is None or measure.chain is not None


def new_sweep(task: Task, backend: ModuleType) -> Sweep:
    """*retain*, of one process or of one rank."""
    return (Sweep if task.student.head.shard is None else ShardedSweep)(task, backend)


def agree_on(
    sides: Sequence[Side | None],  # the student's, the teacher's
    call: str,
    needs: Sequence[bool],
    plan: Sequence[int],  # rows and columns at a time
    measures: Sequence[Measure | None],
    *settings: object,
) -> None:
    """Before the first meeting of a call, raise on all ranks where one has other rows, asks for
    other gradients or takes other steps: ranks would wait for one another, or add up what doesn't
    belong together."""
    student = sides[0]
    if student is None or student.head.shard is None:
        return
    hidden = student.hidden
    names = [m and (m.terms.__name__, m.a, m.b, m.adaptive) for m in measures]
    tops = {f"own bias of the {who}'s head": _top(s) for who, s in zip(WHO, sides, strict=True)}
    table = student.head.shard.agree(
        hidden.device,
        call,
        {
            "the number of rows": len(hidden),
            "the dtype of hidden states": hidden.dtype,
            f"which inputs require a gradient (bits: {', '.join(Needs._fields)})": sum(
                bool(needed) << bit for bit, needed in enumerate(needs)
            ),
            "the plan, made from memory_budget (a checksum)": digest(plan),
            "divergence, temperature and the groups of rows (a checksum)": digest(names, settings),
            **tops,
        },
    )
    for name in tops if table else ():
        found = [own[name] for own in table]
        if not all(top < math.inf for top in found) or max(found) == -math.inf:
            raise ValueError(
                f"the {name[4:]} must be finite, or -inf for some tokens, got maxima of {found}"
            )


def _top(side: Side | None) -> float:
    """The largest bias, looked at where that costs next to nothing; 0 if there is none."""
    bias = None if side is None else side.head.bias
    return 0.0 if bias is None or bias.device.type != "cpu" else float(bias.detach().max())
