"""What vLLM itself was asked and answered (tests/engines/record_exchange.py), played back.

The client must ask the same again, word for word, and understand what came.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tiny

from dudi.served import BadAnswerError, Client, Endpoint
from dudi.teacher_cache import Entry
from dudi.vllm_engine import Asked, ServedEngine, sampling_parameters

RECORDED = json.loads((Path(__file__).parent / "vllm_exchange.json").read_text(encoding="utf-8"))
ROOT = "http://recorded"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Play one of the exchanges; returns what has not been asked for yet."""
    left: list[dict[str, Any]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        path = str(request.url).removeprefix(f"{ROOT}/")
        if path == "v1/models":
            return httpx2.Response(200, json={"data": [{"id": "m"}]})
        one = left.pop(0)
        asked = json.loads(request.content) if request.content else None
        assert (path, asked) == (one["path"], one["asked"])
        return httpx2.Response(one["status"], json=one["answer"])

    own = httpx2.Client
    monkeypatch.setattr(
        httpx2, "Client", lambda **options: own(transport=httpx2.MockTransport(answer))
    )

    def play(name: str) -> list[dict[str, Any]]:
        left[:] = RECORDED[name]
        return left

    return play


def test_the_teacher(played: Callable[[str], list[dict[str, Any]]]) -> None:
    left = played("teacher")
    ids, values = Client(Endpoint(ROOT, None, 3)).rows(Entry([5, 6], [7, 8, 9]))
    assert not left and ids.shape == values.shape == (3, 3)
    assert (values.diff(dim=-1) <= 0).all() and (values < 0).all()
    positions = RECORDED["teacher"][0]["answer"]["choices"][0]["prompt_logprobs"]
    for row, said in zip(range(3), positions[2:], strict=False):
        best = sorted((v["logprob"] for v in said.values()), reverse=True)[:3]
        assert values[row].tolist() == pytest.approx(best)
        assert all(str(i) in said for i in ids[row].tolist())


def test_a_refusal(played: Callable[[str], list[dict[str, Any]]]) -> None:
    played("refused")
    with pytest.raises(BadAnswerError, match=r"answers 400.*logprobs"):
        Client(Endpoint(ROOT, None, 21)).positions([5, 6, 7])


def test_samples_and_weights(tmp_path: Path, played: Callable[[str], list[dict[str, Any]]]) -> None:
    args = tiny.config(
        tmp_path, rollout_backend="vllm", vllm_url=ROOT, stop_strings=["a"],
        generation_kwargs={"min_p": 0.001}, top_p=0.95, max_completion_length=4,
    )  # fmt: skip
    left = played("sample")
    engine = ServedEngine(args, sampling_parameters(args, tiny.tokenizer().eos_token_id))
    (said,) = engine.sample([Asked([5, 6, 7], 11)], True)
    choice = RECORDED["sample"][0]["answer"]["choices"][0]
    assert not left and said.ids == choice["token_ids"]
    assert said.finish_reason == choice["finish_reason"]
    assert said.log_probs is not None and all(v <= 0 for v in said.log_probs)
    left = played("reload")
    engine.reload(Path("m"))
    assert not left
