"""A teacher behind an OpenAI-compatible completions endpoint: vLLM's `prompt_logprobs`.

A prompt and a response go there as token ids; what comes back has the likeliest tokens of each
position and their log-probabilities at temperature 1. endpoint.py says what is tried again. An
answer that is not of this form is an error; one that is about a single request costs, if asked for,
the response that it was about and no more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dudi.endpoint import Server, ServerError
from dudi.known import Answers, KnownTop
from dudi.packed import Packed
from dudi.teacher_cache import About, Entry, asked_of
from dudi_kernels import TopKTeacher
from dudi_kernels.topk import SLACK

OF_A_REQUEST = (400, 413, 422)  # what is wrong with it, not with the server
MOST_LOST, LOST_SEEN = 0.5, 64  # a larger share, of at least so many, is no chance
API_KEY = "DUDI_TEACHER_API_KEY"  # environment variable
PROBE = "The quick brown fox jumps over 13 lazy dogs"
KNOWN_TOKENS = 0.5  # share of the probe's tokens that must spell the same


class TeacherServerError(ServerError):
    """The teacher's server can't be reached, or answers otherwise than it should."""


class BadAnswerError(TeacherServerError):
    """What came in answer to one request can't be used."""


@dataclass(frozen=True)
class Endpoint:
    """A server, and how patient one is with it."""

    url: str  # with or without /v1
    model: str | None  # None: the first that it names
    top_k: int
    timeout: float = 60.0  # seconds
    retries: int = 5
    concurrency: int = 8


Found = tuple[Tensor, Tensor] | BadAnswerError


class Client(Server):
    """Requests to one endpoint, some at a time; `tokens`: how many the student has."""

    error = TeacherServerError
    bad_answer = BadAnswerError
    of_a_request = OF_A_REQUEST

    def __init__(self, endpoint: Endpoint, tokens: int | None = None) -> None:
        e = self.endpoint = endpoint
        super().__init__(e.url, "teacher_url", API_KEY, e.timeout, e.retries, e.concurrency)
        self.tokens = tokens
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
        for token, position in zip(entry.response, said, strict=True):
            if str(int(token)) not in position:  # it always comes, unless the places are others
                raise self.wrong(f"must say how likely the own token {token} is", position)
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
        most = self.tokens or max(i for _, i in found) + 1
        if len({i for _, i in found}) < len(found) or not all(0 <= i < most for _, i in found):
            raise self.wrong(f"must name tokens below {most}, each once", position)
        best = sorted(found, key=lambda one: (-one[0], one[1]))[: self.endpoint.top_k]
        if not sum(math.exp(value) for value, _ in best) <= 1 + SLACK:
            raise self.wrong("must give probabilities that sum to 1 at most", position)
        return [(min(value, 0.0), i) for value, i in best]

    def all_rows(self, asked: Sequence[Entry], skip_bad: bool = False) -> list[Found]:
        """In order; the first error ends it, unless it is about one request and `skip_bad`."""

        def rows(entry: Entry) -> Found:
            try:
                return self.rows(entry)
            except BadAnswerError as error:
                if not skip_bad:
                    raise
                return error

        return self.each(rows, asked)


class ServedTeacher(KnownTop):
    """A server's teacher; its tokenizer must be `tokenizer`, which is tried on a sentence.

    skip_bad: responses without a usable answer are lost, not errors, as long as they are few.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        tokenizer: str | None,
        spell: Any,
        tokens: int | None = None,  # of the student
        skip_bad: bool = False,
    ) -> None:
        what = f"the teacher at teacher_url {endpoint.url!r}"
        super().__init__(tokenizer, tokens, what)
        self.client = Client(endpoint, tokens)
        self.skip_bad, self.asked, self.lost = skip_bad, 0, 0
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

    def top(self, packed: Packed) -> Answers:
        k, asked = self.client.endpoint.top_k, asked_of(packed)
        found = self._found(asked)
        which = torch.arange(len(asked)).repeat_interleave(
            torch.tensor([len(entry.response) for entry in asked], dtype=torch.long)
        )[packed.order]  # (N,) the entry that each row is of
        lost = {
            int(packed.segment_ids[which == i][0]): str(answer)
            for i, answer in enumerate(found)
            if isinstance(answer, BadAnswerError)
        }
        none = (torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))
        rows = (
            _nothing(len(entry.response), k) if isinstance(answer, BadAnswerError) else answer
            for entry, answer in zip(asked, found, strict=True)
        )
        ids, log_probs = (torch.cat(part)[packed.order] for part in zip(none, *rows, strict=True))
        return Answers(TopKTeacher(ids, log_probs), lost)

    def _found(self, asked: Sequence[Entry]) -> list[Found]:
        """Raises TeacherServerError where so much is lost that the server itself is at fault."""
        found = self.client.all_rows(asked, self.skip_bad)
        bad = [answer for answer in found if isinstance(answer, BadAnswerError)]
        self.asked, self.lost = self.asked + len(found), self.lost + len(bad)
        if self.asked >= LOST_SEEN and self.lost > MOST_LOST * self.asked:
            told = f"; the last: {bad[-1]}" if bad else ""
            raise TeacherServerError(
                f"{self.what} gives no usable answer to {self.lost} of {self.asked} requests{told}"
            )
        return found

    # ---- as what fills a cache -------------------------------------------------------------------

    @property
    def identity(self) -> str:
        return f"served {self.client.model}"

    def about(self) -> About:
        name, k = self.client.model, self.client.endpoint.top_k
        identity = hashlib.blake2b(self.identity.encode(), digest_size=16).hexdigest()
        return About("topk", name, identity, None, k)

    def begin(self, folder: Path) -> About:
        return self.about()

    def answers(self, asked: Sequence[Entry]) -> Iterator[dict[str, Tensor] | str]:
        for answer in self._found(asked):
            if isinstance(answer, BadAnswerError):
                yield str(answer)
            else:
                yield {"ids": answer[0].int(), "log_probs": answer[1]}


def _nothing(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Valid rows, to weigh nothing."""
    return torch.arange(k).expand(rows, k), torch.full((rows, k), -math.log(2 * k))


def _letters(text: str) -> str:
    """Without what marks spaces in one tokenizer or another."""
    return "".join(c for c in text if c.isascii() and c.isalnum())


def open_server(args: Any, tokenizer: Any, tokens: int) -> ServedTeacher:
    """The teacher of a recipe with `teacher_url`; `tokenizer` and `tokens` are the student's."""
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
    return ServedTeacher(endpoint, named, own, tokens, args.skips_bad)
