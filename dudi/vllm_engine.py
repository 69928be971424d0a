"""vLLM as a source of samples: a server, or an engine in this process. Token ids in, token ids out.

Both take the same sampling parameters, all of them sent with each request, so that no default of a
server or of a model's generation_config.json comes in. Both get weights in the same way: a folder
of safetensors that the workers load in place (`reload_weights`), after which no cached prefix is
left. Tested with vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dudi.config import DuDiConfig
from dudi.endpoint import Server, ServerError

API_KEY = "DUDI_VLLM_API_KEY"  # environment variable
RELOAD = "reload_weights"  # of vLLM's workers


class VllmError(ServerError):
    """vLLM can't be reached, or answers otherwise than it should."""


class Asked(NamedTuple):
    prompt: list[int]
    seed: int


class Said(NamedTuple):
    ids: list[int]
    finish_reason: str  # vLLM's: stop or length
    log_probs: list[float] | None  # of ids, at temperature 1, where asked for


class Engine(Protocol):
    def sample(self, asked: Sequence[Asked], log_probs: bool) -> list[Said]:
        """One completion of each prompt, in order."""

    def reload(self, folder: Path) -> None:
        """Take the weights that lie there, and forget what was cached under others."""


def sampling_parameters(args: DuDiConfig, eos_token_id: int | list[int]) -> dict[str, Any]:
    """Of vLLM's SamplingParams and of its completions endpoint, which share their names."""
    own = {"min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    own |= args.generation_kwargs or {}  # DuDiConfig refused what has no counterpart
    return {
        "temperature": args.rollout_temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": own["min_p"],
        "repetition_penalty": own["repetition_penalty"],
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": args.max_completion_length,
        "min_tokens": own["min_new_tokens"],
        "stop": list(args.stop_strings or []),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may have them
        "ignore_eos": True,  # what ends a sample is the run's tokenizer's, not the server's
        "stop_token_ids": [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id),
    }


class ServedEngine(Server):
    """A `vllm serve` that was started with VLLM_SERVER_DEV_MODE=1, which lets weights in."""

    error = VllmError

    def __init__(self, args: DuDiConfig, parameters: Mapping[str, Any]) -> None:
        assert args.vllm_url is not None  # DuDiConfig saw to it
        patience = args.vllm_timeout, args.vllm_retries, args.vllm_concurrency
        super().__init__(args.vllm_url, "vllm_url", API_KEY, *patience)
        self.parameters = parameters
        self.model = self.first_model()

    def sample(self, asked: Sequence[Asked], log_probs: bool) -> list[Said]:
        return self.each(partial(self._complete, log_probs=log_probs), asked)

    def _complete(self, asked: Asked, log_probs: bool) -> Said:
        body = {
            **self.parameters,
            "model": self.model,
            "prompt": asked.prompt,
            "seed": asked.seed,
            "return_token_ids": True,
            "logprobs": 0 if log_probs else None,  # of the token itself
        }
        answer = self.ask("POST", "v1/completions", body)
        try:
            choice = answer["choices"][0]
            ids, reason, read = (
                choice[n] for n in ("token_ids", "finish_reason", "prompt_token_ids")
            )
            values = choice["logprobs"]["token_logprobs"] if log_probs else None
        except (KeyError, IndexError, TypeError):
            raise self.wrong("must answer choices[0] with token ids (vLLM does)", answer) from None
        if read != asked.prompt:
            raise self.wrong(f"must read the prompt as it is, {asked.prompt}", read)
        if not (_are(int, ids) and (values is None or _are(float, values, len(ids)))):
            raise self.wrong("must answer token ids and a log-probability of each", choice)
        if reason not in ("stop", "length"):
            raise self.wrong("must end a sample by stop or length", choice)
        return Said(ids, reason, values)

    def reload(self, folder: Path) -> None:
        body = {"method": RELOAD, "kwargs": {"weights_path": str(folder)}}
        try:
            self.ask("POST", "collective_rpc", body, again=())
        except VllmError as error:
            hint = ""
            if error.status == 404:
                hint = ": a server takes weights if it was started with VLLM_SERVER_DEV_MODE=1"
            elif error.status is not None:
                hint = f": does the server see {folder} (vllm_sync_dir), and may it read there?"
            raise VllmError(f"{error}{hint}") from error
        done = self.ask("POST", "reset_prefix_cache")
        if isinstance(done, dict) and done.get("success") is not True:
            raise self.wrong("must forget cached prefixes, which older weights made", done)


def _are(kind: type, values: Any, count: int | None = None) -> bool:
    """Whether these are so many numbers, one at least; JSON may write 0.0 as 0."""
    kinds = (int, float) if kind is float else (int,)
    return (
        isinstance(values, list)
        and len(values) == (count or len(values) or 1)
        and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    )


class ColocatedEngine:
    """vLLM's `LLM` beside the student; asleep between draws where `enable_sleep_mode` is given."""

    def __init__(self, args: DuDiConfig, parameters: Mapping[str, Any], folder: Path) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ValueError(
                "vllm_mode='colocate' needs vLLM in this environment (pip install dudi[vllm]): "
                f"{error}"
            ) from error
        limits: dict[str, Any] = {}
        if args.max_prompt_length is not None and args.max_completion_length is not None:
            limits["max_model_len"] = args.max_prompt_length + args.max_completion_length
        own = args.vllm_engine_kwargs or {}
        self.llm = LLM(model=str(folder), **{"seed": args.seed, **limits, **own})
        self.parameters, self.params_type = parameters, SamplingParams
        self.sleeps, self.asleep = bool(own.get("enable_sleep_mode")), False

    def sample(self, asked: Sequence[Asked], log_probs: bool) -> list[Said]:
        more = {"logprobs": 0} if log_probs else {}
        self._wake()
        outputs = self.llm.generate(
            [{"prompt_token_ids": one.prompt} for one in asked],
            [self.params_type(**self.parameters, **more, seed=one.seed) for one in asked],
            use_tqdm=False,
        )
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = True
        return [self._said(output.outputs[0], log_probs) for output in outputs]

    def _said(self, output: Any, log_probs: bool) -> Said:
        ids = list(output.token_ids)
        if output.finish_reason not in ("stop", "length") or not ids:
            raise VllmError(f"vLLM must end a sample by stop or length, got {output}")
        values = None
        if log_probs:
            values = [own[i].logprob for i, own in zip(ids, output.logprobs, strict=True)]
        return Said(ids, output.finish_reason, values)

    def reload(self, folder: Path) -> None:
        self._wake()
        self.llm.collective_rpc(RELOAD, kwargs={"weights_path": str(folder)})
        if self.llm.reset_prefix_cache() is False:
            raise VllmError("vLLM must forget cached prefixes, which older weights made")

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
