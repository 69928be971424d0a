"""Requests to a server that may fail in passing: JSON there, JSON back, some at a time.

What may pass (no connection, a timeout, 429, 5xx) is tried again, later each time; all else is an
error that says what the server said. The teacher's server (served.py) and the student's
(vllm_engine.py) are reached by this.
"""

from __future__ import annotations

import os
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before another try
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
SHOWN = 300  # characters of what a server says

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class ServerError(RuntimeError):
    """The server can't be reached, or answers otherwise than it should."""

    status: int | None = None  # of its answer, where it was not 200


def root_of(url: str) -> str:
    """Without a slash and the /v1 of OpenAI's endpoints at its end."""
    return url.rstrip("/").removesuffix("/v1")


class Server:
    """One server, and how patient one is with it."""

    error: type[ServerError] = ServerError
    bad_answer: type[ServerError] | None = None  # what came for one request; None: as `error`
    of_a_request: Sequence[int] = ()  # statuses that say so

    def __init__(
        self,
        url: str,  # with or without /v1
        argument: str,  # what the URL is called where it was given
        api_key: str,  # environment variable that may have a key
        timeout: float,  # seconds
        retries: int,
        concurrency: int,
    ) -> None:
        self.root, self.argument = root_of(url), argument
        self.retries, self.concurrency = retries, concurrency
        limits = httpx2.Limits(max_connections=concurrency)
        key = os.environ.get(api_key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx2.Client(timeout=timeout, limits=limits, headers=headers)
        weakref.finalize(self, self.http.close)  # connections that are kept alive

    def first_model(self) -> str:
        found = self.ask("GET", "v1/models")
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self.wrong("must name a model in data[0].id", found) from None

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        again: Sequence[int] = TRY_AGAIN,
    ) -> Any:
        """The JSON that the server answers; None for an empty answer. A status of `again`, like
        no answer, is tried again."""
        url = f"{self.root}/{path}"
        for tried in range(self.retries + 1):
            if tried:
                wait = min(FIRST_WAIT * 2 ** (tried - 1), LONGEST_WAIT)
                time.sleep(wait * random.uniform(0.75, 1.25))  # not all clients at once
            try:
                response = self.http.request(method, url, json=body)
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as bad:
                raise ValueError(f"{self.argument} must be a URL, got {url!r}: {bad}") from bad
            except httpx2.TransportError as lost:
                fault = f"can't be reached: {type(lost).__name__}: {lost}"
                continue
            if response.status_code == 200:
                return self._json(response) if response.content else None
            fault = f"answers {response.status_code}: {response.text[:SHOWN]!r}"
            if response.status_code not in again:
                one = response.status_code in self.of_a_request
                error = self._of_one(f"{url} {fault}") if one else self.error(f"{url} {fault}")
                error.status = response.status_code
                raise error
        raise self.error(f"{url} {fault} ({self.retries + 1} tries)")

    def _json(self, response: Any) -> Any:
        try:
            return response.json()
        except ValueError as error:
            shown = response.text[:SHOWN]
            raise self._of_one(f"{response.url} must answer JSON, got {shown!r}") from error

    def _of_one(self, fault: str) -> ServerError:
        return (self.bad_answer or self.error)(fault)

    def wrong(self, what: str, got: Any) -> ServerError:
        return self._of_one(f"{self.root} {what}, got {str(got)[:SHOWN]}")

    def each(self, ask: Callable[[Asked], Answered], asked: Sequence[Asked]) -> list[Answered]:
        """`ask` of each, some at a time, in order; the first error ends it."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = [pool.submit(ask, one) for one in asked]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
