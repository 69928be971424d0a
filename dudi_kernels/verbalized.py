"""Steps over a tile whose divergence is over classes of tokens (verbalizer.py).

With class logits s'_k = log sum_(v in k) exp(s_v / T) and t'_k = log sum_u M_uk exp(t_u / T), the
divergence is an ordinary one, of K classes at temperature 1. Its gradient d_k in the class logits
becomes d_k exp(s_v / T - s'_k) / T in those of tokens. Log-probabilities, entropies and what they
add to the gradient stay the tokens'. Class logits are made for a few rows at a time. A teacher that
gives no class any mass in a row (unmatched="renormalize") says nothing there: it is taken to agree.
"""

from __future__ import annotations

from types import ModuleType

import torch

from dudi_kernels.classes import Classes
from dudi_kernels.tiles import RowState, Setting, Steps, Tile, slope


class Verbalized:
    """Buffers and state of the classes of one sweep."""

    def __init__(
        self,
        classes: Classes,
        backend: ModuleType,
        setting: Setting,  # of the tokens
        state: RowState,  # of all rows
        teacher_size: int,
    ):
        self.classes, self.backend = classes, backend
        self.rows = rows = setting.tile_rows  # at a time
        self.setting, self.state = setting, state
        self.masked = setting.masked or classes.masked  # whether a class logit may be -inf
        plain = setting._replace(targets=None, inv_tau=1.0, teacher_inv_tau=1.0)
        plain = plain._replace(softcap=None, scale=1.0)
        self.teacher_setting = plain._replace(vocabulary=teacher_size)
        self.class_setting = plain._replace(vocabulary=classes.size, masked=self.masked)
        self.class_state = RowState.fresh(state.weight)
        if state.mixture is not None:
            self.class_state.mixture = torch.zeros_like(state.mixture)
        self.teacher_state = RowState.fresh(state.weight)
        device = state.weight.device
        self.student = torch.empty(rows, classes.size, device=device)
        self.teacher = torch.empty_like(self.student)
        self.shares = torch.empty(rows, len(classes.shared.tokens), device=device)
        self.pulled = torch.empty(rows, setting.vocabulary, device=device)

    def steps(self, tile: Tile, wanted: Steps) -> None:
        """Take the wanted steps over a tile of whole rows, in place."""
        for start in range(0, len(tile.student), self.rows):
            local = slice(start, min(start + self.rows, len(tile.student)))
            assert tile.teacher is not None
            part = tile._replace(
                student=tile.student[local],
                teacher=tile.teacher[local],
                first_row=tile.first_row + start,
            )
            self._part(part, wanted)

    def _part(self, tile: Tile, wanted: Steps) -> None:
        early = Steps(statistics=wanted.statistics, sums=wanted.sums)
        if any(early):
            tokens = tile._replace(teacher=None, measure=None)
            self.backend.steps(self.setting, self.state, tokens, early)
        if wanted.sums:
            self._teacher_entropy(tile)
        if wanted.sums or wanted.gradient:
            self._divergence(tile, wanted)
        if wanted.gradient:
            self._gradient(tile)

    def _teacher_entropy(self, tile: Tile) -> None:
        """At temperature 1, over all of its tokens."""
        assert tile.teacher is not None
        tokens = Tile(tile.teacher, None, tile.first_row, 0, None)
        both = Steps(statistics=True, sums=True)
        self.backend.steps(self.teacher_setting, self.teacher_state, tokens, both)
        own = tile.own
        self.state.teacher_entropy[own] = self.teacher_state.entropy[own]

    def _divergence(self, tile: Tile, wanted: Steps) -> None:
        """Of the classes; its gradient takes the place of the student's class logits."""
        assert tile.teacher is not None
        rows, classes, setting = len(tile.student), self.classes, self.setting
        student, teacher = self.student[:rows], self.teacher[:rows]
        make = self.backend.class_logits
        make(classes.student, tile.student, setting.inv_tau, student)
        make(classes.teacher, tile.teacher, setting.teacher_inv_tau, teacher)
        if classes.masked:  # the bucket, the last class: no teacher token makes it
            teacher[:, -1] = -torch.inf
        if self.masked:
            silent = teacher.amax(1, keepdim=True) == -torch.inf
            torch.where(silent, student, teacher, out=teacher)
        if wanted.gradient:
            shares = self.shares[:rows]
            self.backend.shares(classes.shared, tile.student, setting.inv_tau, student, shares)
        own = wanted._replace(teacher_statistics=wanted.sums, statistics=wanted.sums)
        of_classes = Tile(student, teacher, tile.first_row, 0, tile.measure)
        self.backend.steps(self.class_setting, self.class_state, of_classes, own)
        if wanted.sums:
            rows_of = tile.own
            for name in ("divergence", "g_sum", "poles"):
                getattr(self.state, name)[rows_of] = getattr(self.class_state, name)[rows_of]

    def _gradient(self, tile: Tile) -> None:
        """What classes and tokens add to it, in place of the tokens' logits."""
        rows, logits, state = len(tile.student), tile.student, self.state
        alone = state.coefficient is None and state.entropy_weight is None
        factor = slope(logits, self.setting)
        pulled = logits if alone else self.pulled[:rows]
        inv_tau = self.setting.inv_tau
        self.backend.pull(self.classes, self.student[:rows], self.shares[:rows], inv_tau, pulled)
        if factor is not None:
            pulled.mul_(factor)
        if not alone:
            tokens = tile._replace(teacher=None, measure=None)
            self.backend.steps(self.setting, state, tokens, Steps(gradient=True))
            logits.add_(pulled)
