"""Rollouts by vLLM: with a stand-in that takes weights and samples under seeds, one that is deaf to
weights, and scripted answers. tests/engines has vLLM itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_distributed import LAUNCHER, run
from test_served import Scripted, serving, waits
from transformers import AutoModelForCausalLM

from dudi.finite import NonFiniteLossError
from dudi.merged import write_merged
from dudi.saving import DiskError
from dudi.trainer import DuDiTrainer
from dudi.vllm_engine import Asked, ServedEngine, VllmError, sampling_parameters

assert waits  # a fixture
HERE = Path(__file__).parent
EOS = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its first weights are another model's: what it samples from is what it is sent."""
    with serving(tiny.model(5), tmp_path_factory.mktemp("student")) as url:
        yield url


def make(
    folder: Path, url: str | None, peft_config: Any = None, model: Any = None, **settings: Any
) -> DuDiTrainer:
    defaults: dict[str, Any] = {
        "rollout_backend": "vllm",
        "vllm_url": url,
        "vllm_tolerance": 1e-5,
        "learning_rate": 3e-2,
        "max_steps": 3,
    }
    return DuDiTrainer(
        model or tiny.model(0),
        tiny.model(1),
        args=tiny.config(folder, **(defaults | settings)),
        train_dataset=tiny.rows(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def lora(**settings: Any) -> LoraConfig:
    defaults: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**(defaults | settings))


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", [None, lora()], ids=["whole", "adapter"])
def test_samples_are_the_students_of_each_step(server: str, tmp_path: Path, adapter: Any) -> None:
    """The gap to what was sent stays at rounding while the student moves; a run repeats."""
    logs = []
    for name in ("one", "again"):
        folder = tmp_path / name
        make(folder, server, adapter, stop_strings=["a"], num_generations=2).train()
        logs.append(tiny.logged(folder))
        assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl"]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    checked = [r["completions/engine_gap"] for r in logs[0] if "completions/engine_gap" in r]
    assert len(checked) == 2 and max(checked) < 1e-6  # after the 1st and the 2nd time
    assert all(r["weight_sync_seconds"] > 0 for r in logs[0])
    assert 0 < logs[0][0]["completions/clipped_ratio"] < 1


def test_weights_that_are_sent_every_other_step(server: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vllm_sync_steps": 2, "max_steps": 4, "rollout_importance": True}
    make(tmp_path, server, **settings).train()
    found = tiny.logged(tmp_path)
    assert [r["rollout_staleness"] for r in found] == [0, 1, 0, 1]
    assert ["weight_sync_seconds" in r for r in found] == [True, False, True, False]
    assert all(0 < r["rollout_importance"] < 1 for r in found[1::2])


def test_a_resumed_run_is_sent_weights_when_one_never_stopped_is(
    server: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "vllm_sync_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    make(tmp_path / "whole", server, **settings).train()
    whole = tiny.logged(tmp_path / "whole")
    sent = ["weight_sync_seconds" in r for r in whole]
    assert sent == [True, False, True, True, False, True]
    trainer = make(tmp_path / "again", server, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again = tiny.logged(tmp_path / "again")
    assert [r["loss"] for r in again] == [r["loss"] for r in whole[3:]]
    assert ["weight_sync_seconds" in r for r in again] == sent[3:]


def test_importance_is_of_the_policy_that_drew(server: str, tmp_path: Path) -> None:
    """What the engine says of its tokens is what the student then said."""
    trainer = make(tmp_path, server, rollout_steps=2, rollout_importance=True)
    trainer.state.max_steps = 4
    iterator = iter(trainer.get_train_dataloader())
    (inputs,), _ = trainer.get_batch_samples(iterator, 1, torch.device("cpu"))
    batch = inputs["batch"]
    drawn = batch.drawn.log_prob
    found = []
    for prompt, completion in zip(batch.prompts, batch.drawn.completions, strict=True):
        ids = torch.cat([prompt, completion])[None]
        lq = trainer.model.double()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(lq.gather(1, completion[:, None])[:, 0])
    want = torch.cat(found)
    assert (drawn - want).norm() <= 1e-6 * want.norm()


def test_two_ranks_and_one_server(server: str, tmp_path: Path) -> None:
    """Rank 0 sends what all hold together while nobody draws; each rank has samples of its own."""
    run(*LAUNCHER, str(HERE / "vllm_ranks_once.py"), str(tmp_path), server)
    logs = {name: tiny.logged(tmp_path / name) for name in ("whole", "parts", "adapter")}
    for whole, parts in zip(logs["whole"], logs["parts"], strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for found in logs.values():
        assert max(r["completions/engine_gap"] for r in found[:2]) < 1e-6
        assert "completions/engine_gap" not in found[2]


def test_an_engine_that_is_deaf_to_weights(tmp_path: Path) -> None:
    """It starts with the student's own weights, so that nothing is wrong before the second time."""
    with serving(tiny.model(0), tmp_path / "model", "--deaf") as url:
        trainer = make(tmp_path / "run", url)
        message = r"differ after weights were sent 2 times: on average over \d+ tokens by "
        with pytest.raises(VllmError, match=message):
            trainer.train()
        assert trainer.state.global_step == 1
        other = make(tmp_path / "other", url, vllm_tolerance=1e-3)
        with torch.no_grad():
            other.model.lm_head.weight.mul_(2)
        with pytest.raises(VllmError, match=r"sent 1 times: .* causes: another model is served"):
            other.train()


def test_weights_that_are_not_finite_are_never_sent(server: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, server)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="not finite in sampling"):
        trainer.train()


def test_a_folder_that_weights_cant_be_left_in(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = make(tmp_path / "run", server, vllm_sync_dir=str(tmp_path / "file"))
    with pytest.raises(DiskError, match=r"could not be written: .*vllm_sync_dir can be elsewhere"):
        trainer.train()


# ---- what is written -----------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged_into_what_is_written(tmp_path: Path, kind: str) -> None:
    plain = tiny.model(0, tied=False)
    model: Any = get_peft_model(tiny.model(0, tied=False), lora(**ADAPTERS[kind]))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 10)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    write_merged(model, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    ids = torch.arange(5, 20)[None]
    written = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    wanted = model(ids).logits
    assert (written - wanted).norm() <= 1e-6 * wanted.norm()
    assert (written - plain(ids).logits).norm() > 1e-3 * wanted.norm()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_cant_be_merged(tmp_path: Path) -> None:
    tied = get_peft_model(tiny.model(0), lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="an adapter on lm_head, an end of tied embeddings"):
        write_merged(tied, tmp_path)
    tokens = get_peft_model(
        tiny.model(0, tied=False), lora(trainable_token_indices={"embed_tokens": [3]})
    )
    with pytest.raises(ValueError, match="an adapter of kind TrainableTokensWrapper"):
        write_merged(tokens, tmp_path)


# ---- what is asked, and what may come back -------------------------------------------------------

CHOICE = {
    "finish_reason": "stop", "token_ids": [9, EOS], "prompt_token_ids": [3, 4],
    "logprobs": {"token_logprobs": [-2.5, 0]},
}  # fmt: skip
ANSWER = {"choices": [CHOICE]}


def engine(script: Scripted, folder: Path, **settings: Any) -> ServedEngine:
    own: dict[str, Any] = {"rollout_backend": "vllm", "vllm_url": script.url, "vllm_retries": 2}
    args = tiny.config(folder, **(own | settings))
    return ServedEngine(args, sampling_parameters(args, EOS))


def test_every_sampling_parameter_is_sent(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rollout_temperature": 0.7, "top_p": 0.9, "top_k": 40, "stop_strings": ["\n"],
        "generation_kwargs": {"min_p": 0.1, "repetition_penalty": 1.2, "min_new_tokens": 3},
        "max_completion_length": 64,
    }  # fmt: skip
    with Scripted((200, ANSWER), (200, ANSWER)) as script:
        served = engine(script, tmp_path, **settings)
        scored = served.sample([Asked([3, 4], 11)], log_probs=True)
        plain = served.sample([Asked([3, 4], 12)], log_probs=False)
    assert scored == [([9, EOS], "stop", [-2.5, 0])] and plain == [([9, EOS], "stop", None)]
    assert script.asked[0] == {
        "model": "m", "prompt": [3, 4], "seed": 11, "temperature": 0.7, "top_p": 0.9, "top_k": 40,
        "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "max_tokens": 64, "min_tokens": 3, "stop": ["\n"], "include_stop_str_in_output": True,
        "skip_special_tokens": False, "ignore_eos": True, "stop_token_ids": [EOS],
        "return_token_ids": True, "logprobs": 0,
    }  # fmt: skip
    assert script.asked[1]["logprobs"] is None and script.asked[1]["seed"] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "must answer token ids"),
        ({"token_ids": []}, "must answer token ids"),
        ({"token_ids": [9.5, 1]}, "must answer token ids"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "a log-probability of each"),
        ({"logprobs": None}, r"must answer choices\[0\] with token ids \(vLLM does\)"),
        ({"prompt_token_ids": [3]}, r"must read the prompt as it is, \[3, 4\], got \[3\]"),
        ({"finish_reason": "abort"}, "must end a sample by stop or length"),
    ],
)
def test_rubbish_is_an_error_that_says_what_came(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    answer = {"choices": [CHOICE | change]}
    with Scripted((200, answer)) as script, pytest.raises(VllmError, match=message):
        engine(script, tmp_path).sample([Asked([3, 4], 0)], log_probs=True)
    assert len(script.asked) == 1


def test_weights_that_are_not_taken(tmp_path: Path) -> None:
    taken = (200, {"results": [None]})
    for answers, message in (
        ([(404, "Not Found")], r"404.*started with VLLM_SERVER_DEV_MODE=1"),
        ([(500, "Worker failed")], r"Worker failed.*does the server see .*vllm_sync_dir"),
        ([taken, (200, {"success": False})], "must forget cached prefixes"),
    ):
        with Scripted(*answers) as script, pytest.raises(VllmError, match=message):
            engine(script, tmp_path).reload(tmp_path)
        assert len(script.asked) == len(answers)  # what was half taken is not tried again
    with Scripted(taken, (503, ""), (200, "")) as script:
        engine(script, tmp_path).reload(tmp_path)  # older ones answer nothing
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
        assert script.asked == [asked, {}, {}]


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, waits: list[float]) -> None:
    with Scripted((503, "loading"), (429, ""), (200, ANSWER)) as script:
        assert engine(script, tmp_path).sample([Asked([3, 4], 0)], True)[0].ids == [9, EOS]
    assert len(waits) == 2


# ---- in the process ------------------------------------------------------------------------------


class Engine:
    """What is used of vLLM's LLM."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[Any] = []

    def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> Any:
        self.calls.append(("generate", prompts, parameters))
        one = SimpleNamespace(
            token_ids=(9, EOS), finish_reason="stop",
            logprobs=[{9: SimpleNamespace(logprob=-2.5)}, {EOS: SimpleNamespace(logprob=-0.5)}],
        )  # fmt: skip
        return [SimpleNamespace(outputs=[one])] * len(prompts)

    def collective_rpc(self, method: str, kwargs: Any) -> None:
        self.calls.append((method, kwargs))

    def __getattr__(self, name: str) -> Any:
        return lambda **kwargs: self.calls.append((name, kwargs))


def test_an_engine_in_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Awake from the sending of weights to the end of a draw."""
    from dudi.vllm_engine import ColocatedEngine

    fake = SimpleNamespace(LLM=Engine, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    args = tiny.config(
        tmp_path, rollout_backend="vllm", vllm_mode="colocate", max_prompt_length=30,
        vllm_engine_kwargs={"enable_sleep_mode": True, "dtype": "float32"},
    )  # fmt: skip
    parameters = sampling_parameters(args, EOS)
    served = ColocatedEngine(args, parameters, tmp_path)
    llm: Any = served.llm
    assert llm.settings == {
        "model": str(tmp_path), "seed": 42, "max_model_len": 38, "dtype": "float32",
        "enable_sleep_mode": True,
    }  # fmt: skip
    served.reload(tmp_path)
    for _ in range(2):  # the second with the same weights
        assert served.sample([Asked([3, 4], 7)], True) == [([9, EOS], "stop", [-2.5, -0.5])]
    sending = [("reload_weights", {"weights_path": str(tmp_path)}), ("reset_prefix_cache", {})]
    asked = {**parameters, "logprobs": 0, "seed": 7}
    drawing = [("generate", [{"prompt_token_ids": [3, 4]}], [asked]), ("sleep", {"level": 1})]
    assert llm.calls == [*sending, *drawing, ("wake_up", {}), *drawing]
    served.reload(tmp_path)
    assert llm.calls[-3:] == [("wake_up", {}), *sending]


def test_no_vllm_in_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"needs vLLM in this environment \(pip install dudi\[v"):
        make(tmp_path, None, vllm_mode="colocate").train()


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_backend": "sglang"}, "rollout_backend must be one of transformers, vllm"),
        ({"rollout_backend": "vllm"}, "vllm_url must be given with rollout_backend='vllm'"),
        ({"vllm_url": "http://x"}, "vllm_url must not be given with rollout_backend='transf"),
        ({"vllm_mode": "colocate"}, "vllm_url must not be given with .*vllm_mode='colocate'"),
        ({"vllm_mode": "both"}, "vllm_mode must be one of server, colocate"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "among min_p, .*got 'typical_p'"),
        ({"generation_kwargs": {"min_new_tokens": 9}}, "must be at most max_completion_length=8"),
        ({"rollout_temperature": 1e-3}, "rollout_temperature must be at least 0.01 with"),
        ({"rollout_cache": "paged"}, "rollout_cache is transformers'"),
        ({"rollout_batch_size": 4}, "rollout_batch_size must not be given with"),
        ({"vllm_engine_kwargs": {"model": "m"}}, "vllm_engine_kwargs must leave model to the run"),
        ({"vllm_sync_steps": 0}, "vllm_sync_steps must be"),
        ({"vllm_timeout": 0}, "vllm_timeout must be"),
    ],
)
def test_options_that_cant_be_honoured(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.keys() & {"rollout_backend", "vllm_url"} == set():
        settings = {"rollout_backend": "vllm", "vllm_url": "http://x", **settings}
    with pytest.raises(ValueError, match=message):
        tiny.config(tmp_path, **settings)
