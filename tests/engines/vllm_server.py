"""vLLM's own server on the CPU, from .venv-vllm, as a process with a tiny model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import tiny

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
WIDTH = 64  # of tiny models: the CPU build has no attention for heads of 16
PATIENCE = 300  # seconds until it must be up
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def vllm_serving(model: Any, folder: Path, *, max_logprobs: int) -> Iterator[str]:
    """Its URL, once it answers; weights can be sent to it."""
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # not `vllm serve`: vllm-cpu 0.32 looks for its version under the name vllm there
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-logprobs", str(max_logprobs), "--enforce-eager", "--max-model-len", "256"]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--max-num-seqs", "16"], stdout=out, stderr=out, start_new_session=True,
            env=os.environ | ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"}, cwd=folder,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _wait(url: str, process: Any, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx2.get(f"{url}/v1/models")
            return
        except httpx2.TransportError:
            time.sleep(1)
    raise RuntimeError(f"vLLM did not start: {log.read_text()[-3000:]}")
