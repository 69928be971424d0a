"""The student's samples y-: drawn for some optimizer steps at once, and kept until their step.

The batches of `rollout_steps` steps are taken from the loader together, so that their samples can
be drawn together, by the policy of the first of these steps. What has been drawn and not yet
trained on goes into checkpoints. A draw's seed depends on run, step and micro-batch only, so that a
resumed run draws what one never stopped would have drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dudi.config import DuDiConfig
from dudi.meter import Meter
from dudi.rollout import FINISH_REASONS, Rollout, generate
from dudi.vllm_rollout import VllmRollouts

Batch = dict[str, Tensor]  # padded, as the collator gives it


class Drawn(NamedTuple):
    """The samples of a micro-batch, those of one prompt together."""

    completions: list[Tensor]  # on the CPU
    finish_reasons: list[str]
    step: int  # of the policy that drew them
    log_prob: Tensor | None = None  # (R,) of their tokens under that policy at temperature 1


class Step(NamedTuple):
    """An optimizer step to come."""

    batches: list[Batch]
    drawn: list[Drawn | None]  # of each


Score = Callable[[Batch, Drawn], Tensor]  # log-probabilities (R,) under the policy of now


class Sampling:
    """Draws, keeps and hands out the samples of a run."""

    def __init__(self, args: DuDiConfig, tokenizer: Any, meter: Meter, process_index: int) -> None:
        self.args, self.tokenizer, self.meter = args, tokenizer, meter
        self.process_index = process_index
        self.vllm: VllmRollouts | None = None
        if args.rollout_backend == "vllm":
            self.vllm = VllmRollouts(args, tokenizer, meter, process_index)
        self.ahead: list[Step] = []
        self._saved: list[Drawn] = []  # of the checkpoint resumed from

    def window(self, step: int, max_steps: int) -> int:
        """How many steps to draw for at this one, which nothing has been drawn for."""
        every = self.args.rollout_steps if self.args.needs_samples else 1
        return max(1, min(every - step % every, max_steps - step))

    def fill(self, model: nn.Module, batches: list[list[Batch]], step: int, score: Score) -> bool:
        """Draw for these steps, `step` and those after it; whether all logits were finite."""
        flat = [batch for own in batches for batch in own]
        drawn: list[Drawn | None] = [None] * len(flat)
        finite = True
        if self.args.needs_samples and flat:
            if self._saved:
                drawn = [*self._take_saved(len(flat))]
            else:
                rollouts = self._draw(model, flat, step)
                finite = all(r.finite for r in rollouts)
                drawn = [Drawn(r.completions, r.finish_reasons, step) for r in rollouts]
                if self.vllm is not None:
                    drawn = self._as_engine_said(model, flat, rollouts, score) if finite else drawn
                elif len(batches) > 1 and self.args.weighs_rollouts:
                    drawn = [
                        d._replace(log_prob=score(batch, d))
                        for batch, d in zip(flat, drawn, strict=True)
                        if d is not None
                    ]
        left = iter(drawn)
        self.ahead = [Step(own, [next(left) for _ in own]) for own in batches]
        return finite

    def _draw(self, model: nn.Module, flat: Sequence[Batch], step: int) -> list[Rollout]:
        """For each micro-batch; so many sequences at a time as the config says."""
        each, size = self.args.num_generations, self.args.rollout_batch_size
        if self.args.rollout_cache == "paged":  # all in one call, which has the size
            size = len(flat) * each * max(len(batch["row"]) for batch in flat)
        prompts = [[p for p in unpad(batch, "prompt") for _ in range(each)] for batch in flat]
        first = step * self.args.gradient_accumulation_steps
        if self.vllm is not None and not self.vllm.bring(model, step):
            return [Rollout([], [], False)] * len(flat)
        started = time.monotonic()
        if self.vllm is not None:
            rollouts = self.vllm.draw(prompts, first)
        elif size is None:
            rollouts = [self._generate(model, own, first + i) for i, own in enumerate(prompts)]
        else:
            rollouts = self._draw_together(model, prompts, first, size)
        self._measure(rollouts, time.monotonic() - started)
        return rollouts

    def _draw_together(
        self, model: nn.Module, prompts: list[list[Tensor]], first: int, size: int
    ) -> list[Rollout]:
        """Prompts of like length go together, whichever micro-batch they belong to."""
        flat = [p for own in prompts for p in own]
        order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
        found: list[tuple[Tensor, str, bool]] = [(flat[0], "", True)] * len(flat)
        for start in range(0, len(order), size):
            own = order[start : start + size]
            got = self._generate(model, [flat[i] for i in own], first, start)
            for i, completion, reason in zip(own, got.completions, got.finish_reasons, strict=True):
                found[i] = completion, reason, got.finite
        ends = [0, *accumulate(map(len, prompts))]
        return [
            Rollout([c for c, _, _ in part], [r for _, r, _ in part], all(f for _, _, f in part))
            for part in (found[a:b] for a, b in pairwise(ends))
        ]

    def _as_engine_said(
        self, model: nn.Module, flat: Sequence[Batch], rollouts: Sequence[Rollout], score: Score
    ) -> list[Drawn | None]:
        """By the policy whose weights the engine has, with its own log-probabilities; those of the
        first micro-batch are compared with the student's."""
        assert self.vllm is not None and self.vllm.step is not None
        step = self.vllm.step
        made = [Drawn(r.completions, r.finish_reasons, step, r.log_prob) for r in rollouts]
        self.vllm.check(model, rollouts[0], lambda: score(flat[0], made[0]))
        return [d if self.args.weighs_rollouts else d._replace(log_prob=None) for d in made]

    def _generate(
        self, model: nn.Module, prompts: Sequence[Tensor], position: int, *more: int
    ) -> Rollout:
        """The seed depends on run, position and rank only."""
        a = self.args
        return generate(
            model,
            prompts,
            seed=hash((a.seed, position, self.process_index, *more)) % 2**63,
            temperature=a.rollout_temperature,
            top_p=a.top_p,
            top_k=a.top_k,
            **self._limits,
        )

    def greedy(self, model: nn.Module, prompt: Tensor) -> Rollout:
        """What the student would write without chance."""
        return generate(model, [prompt], temperature=0.0, **self._limits)

    @property
    def _limits(self) -> dict[str, Any]:
        longest = self.args.max_completion_length
        assert longest is not None  # DuDiConfig saw to it
        return {
            "max_completion_length": longest,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "stop_strings": self.args.stop_strings,
            "tokenizer": self.tokenizer,
            "options": self.args.generation_kwargs,
            "cache": self.args.rollout_cache,
            "at_once": self.args.rollout_batch_size,
            "autocast": self.args.autocast_dtype,
        }

    def _measure(self, rollouts: Sequence[Rollout], seconds: float) -> None:
        lengths = [len(c) for r in rollouts for c in r.completions]
        clipped = sum(r.finish_reasons.count("length") for r in rollouts)
        self.meter.add("completions/mean_length", sum(lengths), len(lengths))
        self.meter.add("completions/clipped_ratio", clipped, len(lengths))
        self.meter.add("completions/tokens_per_second", sum(lengths), seconds)

    # ---- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What has been drawn and not been trained on."""
        drawn = [d for step in self.ahead for d in step.drawn if d is not None]
        completions = [c for d in drawn for c in d.completions]
        reasons = [FINISH_REASONS.index(r) for d in drawn for r in d.finish_reasons]
        scores = [d.log_prob for d in drawn if d.log_prob is not None]
        return {
            "ids": torch.cat([*completions, torch.zeros(0)]).long(),
            "lengths": torch.tensor([len(c) for c in completions], dtype=torch.long),
            "reasons": torch.tensor(reasons, dtype=torch.long),
            "sizes": torch.tensor([len(d.completions) for d in drawn], dtype=torch.long),
            "steps": torch.tensor([d.step for d in drawn], dtype=torch.long),
            "log_probs": torch.cat([*scores, torch.zeros(0)]),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Hand these out before anything is drawn."""
        lengths = state["lengths"].tolist()
        completions = list(state["ids"].split(lengths))
        scores = state["log_probs"].split(lengths) if len(state["log_probs"]) else ()
        reasons = [FINISH_REASONS[i] for i in state["reasons"].tolist()]
        sizes = state["sizes"].tolist()
        self._saved = [
            Drawn(
                completions[a:b],
                reasons[a:b],
                step,
                torch.cat(scores[a:b]) if scores else None,
            )
            for (a, b), step in zip(
                pairwise([0, *accumulate(sizes)]), state["steps"].tolist(), strict=True
            )
        ]

    def _take_saved(self, count: int) -> list[Drawn]:
        found, self._saved = self._saved, []
        if len(found) != count:
            raise ValueError(
                f"the checkpoint holds samples of {len(found)} micro-batches, the data goes on "
                f"with {count}: another number of ranks wrote it"
            )
        return found

    def clear(self) -> None:
        self.ahead, self._saved = [], []
        self.begin_anew()

    def begin_anew(self) -> None:
        """An engine is sent the weights before the next draw, as that of a resumed run is."""
        if self.vllm is not None:
            self.vllm.forget()


def unpad(batch: Batch, name: str) -> list[Tensor]:
    """The rows of a padded (B, T) tensor at their own lengths."""
    pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"].bool(), strict=True)
    return [ids[mask] for ids, mask in pairs]
