"""A completions endpoint in vLLM's format over a transformers model: `python ... MODEL`.

Prints the port that it listens on. A prompt is a list of token ids; `prompt_logprobs` are those of
the k likeliest tokens at each position and of the prompt's own.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "served/teacher"


class Handler(BaseHTTPRequestHandler):
    model: Any
    tokenizer: Any
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
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or asked["model"] != NAME:
            message = f"The model `{asked['model']}` does not exist."
            return self.reply(404, {"error": {"message": message, "type": "NotFoundError"}})
        with self.lock:
            said = self.prompt_logprobs(asked["prompt"], asked["prompt_logprobs"])
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": said}
        self.reply(200, {"object": "text_completion", "model": NAME, "choices": [choice]})

    @torch.no_grad()
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


if __name__ == "__main__":
    Handler.model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    Handler.tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
