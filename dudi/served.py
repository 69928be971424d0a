"""A teacher behind an OpenAI-compatible completions endpoint: vLLM's `prompt_logprobs`.

A prompt and a response go there as token ids; what comes back has the likeliest tokens of each
position and their log-probabilities at temperature 1. An answer that is not of this form is an
error; endpoint.py says what is tried again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dudi.endpoint import Server, ServerError
from dudi.known import KnownTop
from dudi.signals import Packed
from dudi.teacher_cache import About, Entry, asked_of
from dudi_kernels import TopKTeacher
from dudi_kernels.topk import SLACK

API_KEY = "DUDI_TEACHER_API_KEY"  # environment variable
PROBE = "The quick brown fox jumps over 13 lazy dogs"
KNOWN_TOKENS = 0.5  # share of the probe's tokens that must spell the same


class TeacherServerError(ServerError):
    """The teacher's server can't be reached, or answers otherwise than it should."""


@dataclass(frozen=True)
class Endpoint:
    """A server, and how patient one is with it."""

    url: str  # with or without /v1
    model: str | None  # None: the first that it names
    top_k: int
    timeout: float = 60.0  # seconds
    retries: int = 5
    concurrency: int = 8


class Client(Server):
    """Requests to one endpoint, some at a time."""

    error = TeacherServerError

    def __init__(self, endpoint: Endpoint) -> None:
        e = self.endpoint = endpoint
        super().__init__(e.url, "teacher_url", API_KEY, e.timeout, e.retries, e.concurrency)
        self.model = endpoint.model or self.first_model()

    def positions(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What the server says of each token but the first, given those before it."""
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.endpoint.top_k,
        }
        answer = self.ask("POST", "v1/completions", body)
        try:
            found = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, list):
            raise self.wrong("must answer choices[0].prompt_logprobs (vLLM does)", answer)
        if len(found) != len(ids) or not all(isinstance(p, dict) for p in found[1:]):
            raise self.wrong(f"must say something of each of {len(ids)} tokens", found)
        return found[1:]

    def rows(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """(R, k) ids and log-probabilities for the tokens of a response."""
        said = self.positions([*entry.prompt, *entry.response])[len(entry.prompt) - 1 :]
        top = [self._top(position) for position in said]
        ids = torch.tensor([[i for _, i in row] for row in top])
        return ids, torch.tensor([[value for value, _ in row] for row in top])

    def _top(self, position: dict[str, Any]) -> list[tuple[float, int]]:
        """The k likeliest; the prompt's own token comes with them, however unlikely it is."""
        try:
            found = [(float(said["logprob"]), int(i)) for i, said in position.items()]
        except (KeyError, TypeError, ValueError):
            raise self.wrong("must give {id: {logprob: number}} for a token", position) from None
        if len(found) < self.endpoint.top_k or not all(v <= SLACK for v, _ in found):
            wanted = f"must give {self.endpoint.top_k} log-probabilities for each token"
            raise self.wrong(wanted, position)
        best = sorted(found, key=lambda one: (-one[0], one[1]))[: self.endpoint.top_k]
        return [(min(value, 0.0), i) for value, i in best]

    def all_rows(self, asked: Sequence[Entry]) -> list[tuple[Tensor, Tensor]]:
        """In order; the first error ends it."""
        return self.each(self.rows, asked)


class ServedTeacher(KnownTop):
    """A server's teacher; its tokenizer must be `tokenizer`, which is tried on a sentence."""

    def __init__(self, endpoint: Endpoint, tokenizer: str | None, spell: Any) -> None:
        what = f"the teacher at teacher_url {endpoint.url!r}"
        super().__init__(tokenizer, None, what)
        self.client = Client(endpoint)
        self._check_tokens(spell)

    def _check_tokens(self, tokenizer: Any) -> None:
        """The same ids must be the same text to both sides, as far as the server tells."""
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        pairs = []
        for i, said in zip(ids[1:], self.client.positions(ids), strict=True):
            theirs = said.get(str(i), {}).get("decoded_token")
            if isinstance(theirs, str):
                pairs.append((_letters(tokenizer.decode([i])), _letters(theirs)))
        same = sum(own == theirs for own, theirs in pairs)
        if pairs and same < KNOWN_TOKENS * len(pairs):
            own, theirs = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"{self.what} has another tokenizer: what is {own!r} here is {theirs!r} there; "
                "teacher_tokenizer_name_or_path must be the served model's, and the student's"
            )

    def top(self, packed: Packed) -> TopKTeacher:
        k = self.client.endpoint.top_k
        found = self.client.all_rows(asked_of(packed))
        none = (torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))
        ids, log_probs = (torch.cat(part)[packed.order] for part in zip(none, *found, strict=True))
        return TopKTeacher(ids, log_probs)

    # ---- as what fills a cache -------------------------------------------------------------------

    def about(self) -> About:
        name, k = self.client.model, self.client.endpoint.top_k
        identity = hashlib.blake2b(f"served {name}".encode(), digest_size=16).hexdigest()
        return About("topk", name, identity, None, k)

    def begin(self, folder: Path) -> About:
        return self.about()

    def answers(self, asked: Sequence[Entry]) -> Iterator[dict[str, Tensor]]:
        for ids, log_probs in self.client.all_rows(asked):
            yield {"ids": ids.int(), "log_probs": log_probs}


def _letters(text: str) -> str:
    """Without what marks spaces in one tokenizer or another."""
    return "".join(c for c in text if c.isascii() and c.isalnum())


def open_server(args: Any, tokenizer: Any) -> ServedTeacher:
    """The teacher of a recipe with `teacher_url`; `tokenizer` is the student's."""
    from dudi.models import load_tokenizer

    named = args.teacher_tokenizer_name_or_path or args.teacher_model_name_or_path
    own = load_tokenizer(named, "teacher_tokenizer_name_or_path") if named else tokenizer
    endpoint = Endpoint(
        args.teacher_url,
        args.served_model,
        args.served_top_k,
        args.served_timeout,
        args.served_retries,
        args.served_concurrency,
    )
    return ServedTeacher(endpoint, named, own)
