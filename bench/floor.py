"""The floor: the bare GEMMs of a task, in their best blocking, into buffers that are there already.

Logits of the student (and of the teacher), the gradient of the hidden states and of the weight: no
softmax, no loss, no allocation. No exact method can do with less.
"""

from __future__ import annotations

import torch

from bench.contenders import ALONE
from bench.measure import seconds
from bench.problems import Problem

WHOLE = 10**9
BLOCKINGS = (  # rows, columns
    (512, 4096), (256, 16_384), (512, 8192), (512, 16_384), (512, WHOLE), (WHOLE, WHOLE),
)  # fmt: skip


class Floor:
    def __init__(self, x: Problem, teacher: bool):
        self.x, self.teacher = x, teacher
        blockings = {(min(r, len(x.hidden)), min(c, len(x.weight))) for r, c in BLOCKINGS}
        size = max(rows * columns for rows, columns in blockings)
        self.student_buffer = x.hidden.detach().new_empty(size)
        self.teacher_buffer = torch.empty_like(self.student_buffer)
        self.grad_hidden = torch.zeros_like(x.hidden)
        self.grad_weight = torch.zeros_like(x.weight)
        self.run(max(blockings))  # buffers and threads are there
        self.blocking = min(sorted(blockings), key=self._time)

    def _time(self, blocking: tuple[int, int]) -> float:
        return seconds(lambda: self.run(blocking), self.x.hidden.is_cuda)

    def __call__(self) -> None:
        self.run(self.blocking)

    @torch.no_grad()
    def run(self, blocking: tuple[int, int]) -> None:
        x, (rows, columns) = self.x, blocking
        for a in range(0, len(x.hidden), rows):
            hidden = x.hidden[a : a + rows]
            for c in range(0, len(x.weight), columns):
                weight = x.weight[c : c + columns]
                shape = len(hidden), len(weight)
                logits = self.student_buffer[: shape[0] * shape[1]].view(shape)
                torch.mm(hidden, weight.t(), out=logits)
                if self.teacher:
                    other = self.teacher_buffer[: shape[0] * shape[1]].view(shape)
                    guide = x.teacher_weight[c : c + columns]
                    torch.mm(x.teacher_hidden[a : a + rows], guide.t(), out=other)
                self.grad_hidden[a : a + rows].addmm_(logits, weight)
                self.grad_weight[c : c + columns].addmm_(logits.t(), hidden)


def has_teacher(task: str) -> bool:
    return task not in ALONE
