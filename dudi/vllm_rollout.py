"""Samples by vLLM: the student's weights go there, token ids come back.

Weights are written to a folder that both sides see (memory, where there is room: /dev/shm), given
their name when they are whole, loaded by the engine and removed. A sample's seed depends on run,
step, micro-batch and place in it only. Whether the engine is the student is tested with what it
said: its log-probabilities of its first samples and the student's of the same tokens. Equal weights
prove nothing about reloading, so this is tested again when weights have been sent for the 2nd, 4th,
8th time and so on.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dudi.config import DuDiConfig
from dudi.finite import weights_are_finite
from dudi.merged import is_first_rank, wait_for_all, write_merged
from dudi.meter import Meter
from dudi.rollout import Rollout, cut_at_eos, cut_at_stop, inference_mode_of
from dudi.saving import disk_errors
from dudi.vllm_engine import (
    Asked,
    ColocatedEngine,
    Engine,
    Said,
    ServedEngine,
    VllmError,
    sampling_parameters,
)

MEMORY = Path("/dev/shm")
ROOM = 2  # times the weights' bytes that must be free there


class VllmRollouts:
    """Draws what `rollout.generate` would draw, by an engine that follows the student."""

    def __init__(self, args: DuDiConfig, tokenizer: Any, meter: Meter, process_index: int) -> None:
        self.args, self.tokenizer, self.meter = args, tokenizer, meter
        self.process_index = process_index
        self.engine: Engine | None = None  # from the first draw on
        self.step: int | None = None  # of the weights that the engine has
        self.sent = 0  # times
        self.checking = False  # whether the samples of now are compared with the student

    def forget(self) -> None:
        """The next draw sends weights first."""
        self.step = None

    # ---- weights -------------------------------------------------------------------------------

    def bring(self, model: nn.Module, step: int) -> bool:
        """Send the student's weights if they are due; False where they are not finite. All ranks
        ask: none is still drawing with the old weights then."""
        if self.step is not None and step - self.step < self.args.vllm_sync_steps:
            return True
        if _any_rank(not weights_are_finite(model)):
            return False
        if self.engine is None:
            self.engine = self._open(model)
        started = time.monotonic()
        wait_for_all()
        with self._written(model, f"step-{step}") as folder:
            if is_first_rank():
                self.engine.reload(folder)
        wait_for_all()
        self.step, self.sent = step, self.sent + 1
        self.checking = self.sent & (self.sent - 1) == 0  # 1, 2, 4, 8
        self.meter.add("weight_sync_seconds", time.monotonic() - started, 1)
        return True

    def _open(self, model: nn.Module) -> Engine:
        parameters = sampling_parameters(self.args, self.tokenizer.eos_token_id)
        if self.args.vllm_mode == "server":
            return ServedEngine(self.args, parameters)
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "vllm_mode must be server with several processes, got 'colocate': one server "
                "serves all of them"
            )
        with self._written(model, "start") as folder:
            self.tokenizer.save_pretrained(folder)
            return ColocatedEngine(self.args, parameters, folder)

    @contextmanager
    def _written(self, model: nn.Module, name: str) -> Iterator[Path]:
        """A folder with the weights, while it is needed."""
        place = _place(self.args, model)
        folder = place / name
        try:
            with disk_errors(folder, lambda: "vllm_sync_dir can be elsewhere."):
                if is_first_rank():
                    shutil.rmtree(place, ignore_errors=True)  # what a killed run has left
                    place.mkdir(parents=True, mode=0o700)
                write_merged(model, place / "writing")
                if is_first_rank():
                    (place / "writing").rename(folder)
            yield folder
        finally:
            if is_first_rank():
                shutil.rmtree(place, ignore_errors=True)

    # ---- samples -------------------------------------------------------------------------------

    def draw(self, prompts: Sequence[Sequence[Tensor]], first: int) -> list[Rollout]:
        """One completion of each prompt of each micro-batch; `first` is the number of the first."""
        assert self.engine is not None  # `bring` made it
        asked = [
            Asked(prompt.tolist(), self._seed(first + i, k))
            for i, own in enumerate(prompts)
            for k, prompt in enumerate(own)
        ]
        scored = self.checking or self.args.weighs_rollouts
        found = [self._cut(said) for said in self.engine.sample(asked, scored)]
        ends = [0, *accumulate(map(len, prompts))]
        return [_together(found[a:b]) for a, b in pairwise(ends)]

    def _seed(self, position: int, k: int) -> int:
        return hash((self.args.seed, position, self.process_index, k)) % 2**63

    def _cut(self, said: Said) -> tuple[Tensor, str, Tensor | None]:
        """A sample ends where one of `generate` would: the rules are the same."""
        ids, eos = torch.tensor(said.ids), self.tokenizer.eos_token_id
        completion, reason = cut_at_eos(ids, {eos} if isinstance(eos, int) else set(eos))
        stops = self.args.stop_strings
        stopped = cut_at_stop(completion, stops, self.tokenizer) if stops else None
        if stopped is not None:
            completion, reason = stopped, "stop"
        elif reason == "length" and said.finish_reason == "stop":
            reason = "stop"  # vLLM spells these tokens otherwise
        values = said.log_probs
        return (
            completion,
            reason,
            None if values is None else torch.tensor(values)[: len(completion)],
        )

    # ---- whether the engine is the student -----------------------------------------------------

    def check(self, model: nn.Module, rollout: Rollout, score: Callable[[], Tensor]) -> None:
        """Compare its log-probabilities of a micro-batch's samples with the student's."""
        if not self.checking:
            return
        self.checking = False
        assert rollout.log_prob is not None  # `draw` asked for it
        with inference_mode_of(model):
            own = score().float()
        gap = (own - rollout.log_prob).abs()
        self.meter.add("completions/engine_gap", gap.sum(), len(gap))
        if not float(gap.mean()) <= self.args.vllm_tolerance:
            raise VllmError(self._told(gap, own, rollout))

    def _told(self, gap: Tensor, own: Tensor, rollout: Rollout) -> str:
        assert rollout.log_prob is not None
        worst = int(gap.nan_to_num(torch.inf).argmax())
        token = int(torch.cat(rollout.completions)[worst])
        causes = "another model is served, --logprobs-mode is not raw_logprobs, it is quantized"
        if self.sent > 1:
            causes = (
                "vLLM does not take all weights anew (its CPU build leaves tied heads as they "
                f"were), or what it was told at first was near enough: {causes}"
            )
        return (
            f"vLLM and the student differ after weights were sent {self.sent} times: on average "
            f"over {len(gap)} tokens by {float(gap.mean()):.3g} in their log-probability, "
            f"vllm_tolerance is {self.args.vllm_tolerance}; most at "
            f"{self.tokenizer.decode([token])!r} ({token}), {float(rollout.log_prob[worst]):.4g} "
            f"there and {float(own[worst]):.4g} here. Likely causes: {causes}, or its dtype is "
            "coarse (--dtype)"
        )


def _together(found: Sequence[tuple[Tensor, str, Tensor | None]]) -> Rollout:
    values = [value for _, _, value in found if value is not None]
    return Rollout(
        [ids for ids, _, _ in found],
        [reason for _, reason, _ in found],
        log_prob=torch.cat(values) if values else None,
    )


def _any_rank(flag: bool) -> bool:
    if not dist.is_initialized():
        return flag
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, flag)
    return any(found)


def _place(args: DuDiConfig, model: nn.Module) -> Path:
    """This run's own folder for its weights."""
    name = hashlib.blake2b(str(Path(str(args.output_dir)).resolve()).encode(), digest_size=8)
    own = f"dudi-weights-{name.hexdigest()}"
    if args.vllm_sync_dir is not None:
        return Path(args.vllm_sync_dir).expanduser().resolve() / own
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM * size
    return (MEMORY if roomy else Path(str(args.output_dir)).resolve()) / own
