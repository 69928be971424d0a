"""vLLM itself, on the CPU: as the teacher's server, as what draws the student's samples from
another process, and in one process with the trainer. `make test-engines` installs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_served import compare_with_live
from test_vllm_rollout import EOS, lora, make
from vllm_server import ENVIRONMENT, PYTHON, WIDTH, vllm_serving

from dudi.merged import write_merged
from dudi.rollout import generate
from dudi.served import Client, Endpoint, TeacherServerError
from dudi.vllm_engine import Asked, ServedEngine, VllmError, sampling_parameters

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="vLLM is not installed: make test-engines"
)
HERE = Path(__file__).parent


def student() -> Any:
    return tiny.model(0, WIDTH, tied=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    with vllm_serving(student(), folder, max_logprobs=20) as url:
        yield url


def engine(url: str, folder: Path, model: Any, **settings: Any) -> ServedEngine:
    """With these weights in the server."""
    args = tiny.config(folder / "run", rollout_backend="vllm", vllm_url=url, **settings)
    served = ServedEngine(args, sampling_parameters(args, EOS))
    write_merged(model, folder / "weights")
    served.reload(folder / "weights")
    return served


# ---- a teacher -----------------------------------------------------------------------------------


def test_a_served_teacher_teaches_what_the_live_one_does(server: str, tmp_path: Path) -> None:
    teacher = tiny.model(1, WIDTH, tied=False)
    engine(server, tmp_path, teacher)
    compare_with_live(server, teacher, tmp_path, rel=1e-5)


def test_more_log_probabilities_than_it_gives(server: str) -> None:
    client = Client(Endpoint(server, None, 21))
    with pytest.raises(TeacherServerError, match=r"answers 400: .*greater than max allowed: 20"):
        client.positions([5, 6, 7])
    with pytest.raises(TeacherServerError, match=r"answers 400: .*maximum context length is 256"):
        Client(Endpoint(server, None, 2)).positions([5] * 300)


# ---- samples -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", [None, lora()], ids=["whole", "adapter"])
def test_samples_are_the_students_of_each_step(server: str, tmp_path: Path, adapter: Any) -> None:
    logs = []
    for name in ("one", "again"):
        trainer = make(tmp_path / name, server, adapter, model=student(), max_steps=4)
        trainer.train()
        logs.append(tiny.logged(tmp_path / name))
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    gaps = [r["completions/engine_gap"] for r in logs[0] if "completions/engine_gap" in r]
    assert len(gaps) == 3 and max(gaps) < 1e-6


def test_the_likeliest_tokens_are_those_of_generate(server: str, tmp_path: Path) -> None:
    """To the token, with what ends a sample: its eos and stop strings."""
    model, tokenizer = student(), tiny.tokenizer()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    settings: dict[str, Any] = {"max_completion_length": 12, "stop_strings": ["e"]}
    prompts = [torch.arange(5 * i, 5 * i + 7) for i in range(1, 9)]
    served = engine(server, tmp_path, model, top_k=1, **settings)
    found = served.sample([Asked(p.tolist(), 0) for p in prompts], False)
    wanted = generate(
        model, prompts, temperature=0.0, eos_token_id=EOS, pad_token_id=0, tokenizer=tokenizer,
        **settings,
    )  # fmt: skip
    assert [said.ids for said in found] == [c.tolist() for c in wanted.completions]
    ends = {"stop": "stop", "eos": "stop", "length": "length"}
    assert [said.finish_reason for said in found] == [ends[r] for r in wanted.finish_reasons]
    assert {"stop", "length"} <= set(wanted.finish_reasons)


def test_sampling_parameters_mean_what_they_do_here(server: str, tmp_path: Path) -> None:
    """Frequencies of 2,000 first tokens beside the textbook's probabilities."""
    model, count = student().double(), 2000
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    prompt = [5, 6, 7, 8]
    served = engine(
        server, tmp_path, model.float(), rollout_temperature=0.8, top_k=12, top_p=0.9,
        generation_kwargs={"repetition_penalty": 1.5, "min_new_tokens": 2},
        max_completion_length=2,
    )  # fmt: skip
    said = served.sample([Asked(prompt, seed) for seed in range(count)], False)
    logits = model.double()(torch.tensor([prompt])).logits[0, -1].detach()
    for i in prompt:
        logits[i] *= 1 / 1.5 if logits[i] > 0 else 1.5
    logits[EOS] = -torch.inf
    p, ids = (logits / 0.8).sort(descending=True)
    p = p[:12].softmax(-1)
    p = p * (p.cumsum(-1) - p < 0.9)
    p = p / p.sum()
    drawn = torch.tensor([s.ids[0] for s in said])
    found = torch.stack([(drawn == i).double().mean() for i in ids[:12]])
    assert found.sum().item() == pytest.approx(1)  # nothing else was drawn
    assert ((found - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    again = served.sample([Asked(prompt, seed) for seed in range(20)], False)
    assert [s.ids for s in again] == [s.ids for s in said[:20]]


def test_weights_that_are_not_there(server: str, tmp_path: Path) -> None:
    served = engine(server, tmp_path, student())
    with pytest.raises(VllmError, match=r"answers 500.*does the server see .*nowhere"):
        served.reload(tmp_path / "nowhere")


# ---- in one process ------------------------------------------------------------------------------


def colocated(folder: Path, ends: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    command = [str(PYTHON), str(HERE / "colocated_run.py"), str(folder), ends]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_an_engine_in_the_process_draws_what_a_server_draws(server: str, tmp_path: Path) -> None:
    done = colocated(tmp_path / "colocated", "untied")
    assert done.returncode == 0, done.stderr[-3000:]
    make(tmp_path / "served", server, model=student()).train()
    own, served = (tiny.logged(tmp_path / name) for name in ("colocated", "served"))
    for a, b in zip(own, served, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_tied_head_that_the_cpu_build_does_not_take_anew(tmp_path: Path) -> None:
    """Its packed copy of the head stays: the run finds out when weights are sent again."""
    done = colocated(tmp_path, "tied")
    assert done.returncode != 0
    assert "differ after weights were sent 2 times" in done.stderr
