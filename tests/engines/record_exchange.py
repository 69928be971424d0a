"""Writes tests/vllm_exchange.json: what the real server was asked and what it answered, word for
word. `PYTHONPATH=tests .venv/bin/python tests/engines/record_exchange.py`, after make test-engines.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import httpx2
import tiny
from vllm_server import WIDTH, vllm_serving

from dudi.endpoint import Server
from dudi.served import Client, Endpoint, TeacherServerError
from dudi.teacher_cache import Entry
from dudi.vllm_engine import Asked, ServedEngine, sampling_parameters

FILE = Path(__file__).parents[1] / "vllm_exchange.json"
MODEL = "m"


def recorded(server: Server, act: Any) -> list[dict[str, Any]]:
    """The exchanges of `act()`; the folder that the server was started with is spelt MODEL."""
    found, own = [], server.http.request

    def request(method: str, url: str, json: Any = None) -> Any:
        answer = own(method, url, json=json)
        path = url.removeprefix(f"{server.root}/")
        found.append({"path": path, "asked": json, "status": answer.status_code})
        found[-1]["answer"] = answer.json()
        return answer

    server.http.request = request  # type: ignore[method-assign, assignment]
    act()
    server.http.request = own  # type: ignore[method-assign]
    return found


def refused(client: Client) -> None:
    try:
        client.positions([5, 6, 7])
    except TeacherServerError:
        return
    raise AssertionError("more log-probabilities than --max-logprobs")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        with vllm_serving(tiny.model(1, WIDTH, tied=False), folder, max_logprobs=20) as url:
            args = tiny.config(
                Path(name) / "run", rollout_backend="vllm", vllm_url=url, stop_strings=["a"],
                generation_kwargs={"min_p": 0.001}, top_p=0.95, max_completion_length=4,
            )  # fmt: skip
            engine = ServedEngine(args, sampling_parameters(args, tiny.tokenizer().eos_token_id))
            client = Client(Endpoint(url, None, 3))
            many = Client(Endpoint(url, None, 21))
            found = {
                "vllm": httpx2.get(f"{url}/version").json()["version"],
                "teacher": recorded(client, lambda: client.rows(Entry([5, 6], [7, 8, 9]))),
                "refused": recorded(many, lambda: refused(many)),
                "sample": recorded(engine, lambda: engine.sample([Asked([5, 6, 7], 11)], True)),
                "reload": recorded(engine, lambda: engine.reload(folder)),
            }
        text = json.dumps(found, indent=1, ensure_ascii=False).replace(str(folder), MODEL)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
