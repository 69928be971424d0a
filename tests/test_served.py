"""A teacher behind a server: a real one on loopback, an exchange as vLLM documents it, and servers
that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_teacher_cache import trainer
from test_teaching import kl, log_probs, step, teacher_tokenizer

from dudi import served
from dudi.caching import asked_by, source_of, write_cache
from dudi.served import Client, Endpoint, ServedTeacher, TeacherServerError
from dudi.teacher_cache import CachedTop, Entry

HERE = Path(__file__).parent
K = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a process that serves the tiny teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.model(1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "completions_server.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    with process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def bucketed(p: torch.Tensor, q: torch.Tensor) -> list[torch.Tensor]:
    ids = p.topk(K).indices
    return [torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, True)], 1) for x in (p, q)]


def test_both_signals_and_the_preference_from_a_server(server: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "on_policy_weight": 0.7, "preference_weight": 0.2, "num_generations": 2, "ce_weight": 0.1,
        "max_steps": 1,
    }  # fmt: skip
    live = trainer(tmp_path / "live", tiny.model(1), **settings)
    asked = trainer(tmp_path / "run", None, teacher_url=server, served_top_k=K, **settings)
    assert asked.teacher.client.model == "served/teacher"
    (batch, got), (_, want) = step(asked), step(live)
    p = log_probs(live.teacher, batch.lesson.seen).exp()
    q = log_probs(asked.model, batch.student).exp()
    p, q = bucketed(p, q)
    given = batch.student.segment_ids % 3 == 0
    off, on = kl(p, q)[given].mean(), kl(q, p)[~given].mean()
    assert got.off_policy_loss.item() == pytest.approx(off.item(), rel=1e-5)
    assert got.on_policy_loss.item() == pytest.approx(on.item(), rel=1e-5)
    assert got.preference_loss.item() == pytest.approx(want.preference_loss.item(), rel=1e-5)
    parts = off + 0.7 * on + 0.2 * want.preference_loss + 0.1 * want.ce_loss
    assert got.loss.item() == pytest.approx(parts.item(), rel=1e-5)
    asked.train()
    assert asked.state.global_step == 1


def test_a_cache_from_a_server_is_what_the_server_says(server: str, tmp_path: Path) -> None:
    live = trainer(tmp_path / "live", None, teacher_url=server, served_top_k=K)
    source = source_of(live, "topk", K)
    made = write_cache(tmp_path / "cache", source, live.bridge.tokenizer, asked_by(live))
    assert made[1] == 0 and made[0] > 0
    known = trainer(tmp_path / "run", None, teacher_cache=str(tmp_path / "cache"))
    assert isinstance(known.teacher, CachedTop)
    want, got = step(live)[1], step(known)[1]
    assert torch.equal(want.loss, got.loss)
    with pytest.raises(ValueError, match="cache must be topk with teacher_url"):
        source_of(live, "hidden", K)


def test_another_tokenizer_is_found_out(server: str) -> None:
    with pytest.raises(ValueError, match=r"has another tokenizer: what is .* here is .* there"):
        ServedTeacher(Endpoint(server, None, K), None, teacher_tokenizer())


def test_a_model_that_is_not_served(server: str) -> None:
    client = Client(Endpoint(server, "other", K))
    with pytest.raises(TeacherServerError, match=r"answers 404: .*`other` does not exist"):
        client.positions([1, 2, 3])


# ---- the documented format, and what goes wrong --------------------------------------------------

# In the form that vLLM documents; the prompt's own token comes with the k = 2 likeliest.
RECORDED = {
    "id": "cmpl-1d5e", "object": "text_completion", "created": 1730000000, "model": "m",
    "choices": [{
        "index": 0, "text": " is", "logprobs": None, "finish_reason": "length",
        "stop_reason": None,
        "prompt_logprobs": [
            None,
            {"4": {"logprob": -3.5, "rank": 17, "decoded_token": " b"},
             "9": {"logprob": -0.25, "rank": 1, "decoded_token": " c"},
             "7": {"logprob": -2.0, "rank": 2, "decoded_token": " d"}},
            {"5": {"logprob": -0.125, "rank": 1, "decoded_token": " e"},
             "8": {"logprob": -9999.0, "rank": 2, "decoded_token": " f"}},
        ],
    }],
    "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
}  # fmt: skip


class Scripted:
    """A server that answers what it was told to, in turn, and keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                script.asked.append(json.loads(body))
                status, content = script.answers.pop(0) if script.answers else (200, RECORDED)
                if status == "hang":
                    script.released.wait(20)
                    return
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> Scripted:
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def client(self, **settings: Any) -> Client:
        url = f"http://127.0.0.1:{self.server.server_port}/v1/"
        return Client(Endpoint(url, "m", 2, **({"timeout": 5.0} | settings)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(served.time, "sleep", slept.append)
    return slept


def test_an_exchange_as_documented() -> None:
    with Scripted() as script:
        ids, values = script.client().rows(Entry([3, 4], [5]))
        whole = script.client().rows(Entry([3], [4, 5]))
    assert script.asked[0] == {
        "model": "m", "prompt": [3, 4, 5], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2,
    }  # fmt: skip
    assert ids.tolist() == [[5, 8]] and values.tolist() == [[-0.125, -9999.0]]
    assert whole[0].tolist() == [[9, 7], [5, 8]]
    assert whole[1].tolist() == [[-0.25, -2.0], [-0.125, -9999.0]]


def test_what_may_pass_is_tried_again_later_each_time(waits: list[float]) -> None:
    busy = [(500, "oops"), (503, "loading"), (429, "slow down")]
    with Scripted(*busy) as script:
        ids, _ = script.client().rows(Entry([3, 4], [5]))
    assert ids.tolist() == [[5, 8]] and len(script.asked) == 4
    for i, wait in enumerate(waits):
        assert 0.75 * 0.5 * 2**i <= wait <= 1.25 * 0.5 * 2**i


def test_a_server_that_stays_broken_is_given_up(waits: list[float]) -> None:
    with (
        Scripted(*[(500, "cuda out of memory")] * 9) as script,
        pytest.raises(TeacherServerError, match=r"answers 500: 'cuda out of memory' \(3 tries\)"),
    ):
        script.client(retries=2).rows(Entry([3, 4], [5]))
    assert len(waits) == 2


def test_a_timeout_is_tried_again(waits: list[float]) -> None:
    with Scripted(("hang", "")) as script:
        ids, _ = script.client(timeout=0.3).rows(Entry([3, 4], [5]))
    assert ids.tolist() == [[5, 8]] and len(waits) == 1


def test_nobody_there(waits: list[float]) -> None:
    with pytest.raises(TeacherServerError, match=r"can't be reached: ConnectError.*\(2 tries\)"):
        Client(Endpoint("http://127.0.0.1:9", None, 2, retries=1))
    with pytest.raises(ValueError, match="teacher_url must be a URL"):
        Client(Endpoint("localhost:8000", None, 2, retries=0))


def changed(**choice: Any) -> dict[str, Any]:
    return {"choices": [{**RECORDED["choices"][0], **choice}]}  # type: ignore[index]


def said(values: dict[str, float]) -> dict[str, Any]:
    position = {i: {"logprob": value} for i, value in values.items()}
    return changed(prompt_logprobs=[None, {}, position])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "prompt_logprobs above max"}), "answers 400: .*above max"),
        ((200, "<html>"), "must answer JSON, got '<html>'"),
        ((200, {"choices": []}), "must answer choices"),
        ((200, [1]), "must answer choices"),
        ((200, changed(prompt_logprobs=None)), r"prompt_logprobs \(vLLM does\)"),
        ((200, changed(prompt_logprobs=[None, {}])), "must say something of each of 3 tokens"),
        ((200, changed(prompt_logprobs=[None, None, {}])), "must say something of each"),
        ((200, changed(prompt_logprobs=[None, {}, {"5": -1.0}])), "must give {id: {logprob"),
        ((200, changed(prompt_logprobs=[None, {}, {"x": {"logprob": -1}}])), "must give {id"),
        ((200, changed(prompt_logprobs=[None, {}, {"5": {"logprob": -1}}])), "must give 2 log"),
        (
            (200, changed(prompt_logprobs=[None, {}, {str(i): {"logprob": 1} for i in range(2)}])),
            "must give 2 log-probabilities",
        ),
        ((200, said({"4": -1.0, "7": -1.5})), "must say how likely the own token 5 is"),
        ((200, said({"5": -1.0, "05": -1.5})), "must name tokens below 6, each once"),
        ((200, said({"5": -1.0, "-1": -1.5})), "must name tokens below 6, each once"),
        ((200, said({"5": -0.1, "7": -0.1})), "must give probabilities that sum to 1 at most"),
        ((200, said({"5": -0.1, "7": float("nan")})), "must give 2 log-probabilities"),
    ],
)
def test_rubbish_is_an_error_that_says_what_came(answer: Any, message: str) -> None:
    with Scripted(answer) as script, pytest.raises(TeacherServerError, match=message):
        script.client().rows(Entry([3, 4], [5]))
    assert len(script.asked) == 1  # what is wrong once is wrong again


def test_the_first_error_of_many_ends_it() -> None:
    with Scripted((400, "no")) as script, pytest.raises(TeacherServerError, match="answers 400"):
        script.client(concurrency=1).all_rows([Entry([3, 4], [5])] * 20)
    assert len(script.asked) < 20


def test_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUDI_TEACHER_API_KEY", "k")
    client = Client(Endpoint("http://127.0.0.1:9", "m", 2))
    assert client.http.headers["Authorization"] == "Bearer k"
