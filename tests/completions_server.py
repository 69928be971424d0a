"""A completions endpoint in vLLM's format over a transformers model: `python ... MODEL [--deaf]`.

Prints the port that it listens on. A prompt is a list of token ids; `prompt_logprobs` are those of
the k likeliest tokens at each position and of the prompt's own. Samples are drawn under the seed of
the request; weights are taken from a folder, as vLLM's development mode does. A deaf one says that
it took them and keeps its own.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "served/teacher"


class Handler(BaseHTTPRequestHandler):
    model: Any
    tokenizer: Any
    deaf = False
    lock = threading.Lock()

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"] or 0))
        asked = json.loads(text) if text else {}
        if self.path == "/collective_rpc":
            return self.reload(asked)
        if self.path == "/reset_prefix_cache":
            return self.reply(200, {"success": True})
        if self.path != "/v1/completions" or asked["model"] != NAME:
            message = f"The model `{asked['model']}` does not exist."
            return self.reply(404, {"error": {"message": message, "type": "NotFoundError"}})
        choice = {"index": 0, "text": "", "finish_reason": "length"}
        with self.lock, torch.no_grad():
            if "prompt_logprobs" in asked:
                said = self.prompt_logprobs(asked["prompt"], asked["prompt_logprobs"])
                choice["prompt_logprobs"] = said
            else:
                choice |= self.sample(asked)
        self.reply(200, {"object": "text_completion", "model": NAME, "choices": [choice]})

    def prompt_logprobs(self, ids: list[int], k: int) -> list[Any]:
        log_probs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found: list[Any] = [None]
        for row, target in zip(log_probs, ids[1:], strict=False):
            rank = {int(i): n for n, i in enumerate(row.topk(k).indices, 1)}
            rank.setdefault(target, int((row > row[target]).sum()) + 1)
            found.append({str(i): self.logprob(row, i, n) for i, n in rank.items()})
        return found

    def logprob(self, row: Any, i: int, rank: int) -> dict[str, Any]:
        text = self.tokenizer.decode([i])
        return {"logprob": float(row[i]), "rank": rank, "decoded_token": text}

    # ---- samples and weights ---------------------------------------------------------------------

    def sample(self, asked: dict[str, Any]) -> dict[str, Any]:
        random = torch.Generator().manual_seed(asked["seed"])
        ids, values, reason = list(asked["prompt"]), [], "length"
        for _ in range(asked["max_tokens"]):
            row = self.model(torch.tensor([ids])).logits[0, -1].float()
            drawn = (row / asked["temperature"]).softmax(-1).multinomial(1, generator=random)
            ids.append(int(drawn))
            values.append(float(row.log_softmax(-1)[drawn]))
            written = self.tokenizer.decode(ids[len(asked["prompt"]) :])
            if ids[-1] in asked["stop_token_ids"] or any(s in written for s in asked["stop"]):
                reason = "stop"
                break
        said = {"token_ids": ids[len(asked["prompt"]) :], "prompt_token_ids": asked["prompt"]}
        logprobs = None if asked["logprobs"] is None else {"token_logprobs": values}
        return {**said, "finish_reason": reason, "logprobs": logprobs}

    def reload(self, asked: dict[str, Any]) -> None:
        assert asked["method"] == "reload_weights"
        if not self.deaf:
            with self.lock:
                state = load_file(asked["kwargs"]["weights_path"] + "/model.safetensors")
                missing = self.model.load_state_dict(state, strict=False).missing_keys
                assert set(missing) <= {"lm_head.weight"}  # a tied one
        self.reply(200, {"results": [None]})


if __name__ == "__main__":
    Handler.model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    Handler.tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    Handler.deaf = "--deaf" in sys.argv
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
