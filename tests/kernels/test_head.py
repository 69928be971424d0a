"""LMHead.from_model and .check on tiny models of each kind, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from dudi_kernels import LMHead, linear_log_prob

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict] = {  # model type: settings that shape its logits
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.3},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.3, "tie_word_embeddings": True},
    "phi": {},  # a bias
    "gpt2": {},
}


def tiny(kind: str, **settings) -> transformers.PreTrainedModel:
    sizes = SIZES
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough logits for a softcap to matter
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_heads_make_the_models_own_logits(kind):
    model = tiny(kind, **MODELS[kind])
    LMHead.check(model)
    head = LMHead.from_model(model)
    assert head.weight is model.get_output_embeddings().weight  # live, not a copy
    assert (head.vocab_size, head.width) == (64, 16)
    ids = torch.randint(64, (2, 6))
    with torch.no_grad():
        want = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
        got = linear_log_prob(hidden, head, ids[:, 1:])
    torch.testing.assert_close(got, want[..., 0], rtol=1e-5, atol=1e-5)


def test_what_is_read():
    assert LMHead.from_model(tiny("gemma2", final_logit_softcapping=0.3)).softcap == 0.3
    assert LMHead.from_model(tiny("gemma2", final_logit_softcapping=None)).softcap is None
    assert LMHead.from_model(tiny("cohere", logit_scale=0.25)).scale == 0.25
    assert LMHead.from_model(tiny("granite", logits_scaling=8.0)).scale == 1 / 8
    assert LMHead.from_model(tiny("phi")).bias is not None
    gpt2 = tiny("gpt2")
    assert LMHead.from_model(gpt2).weight is gpt2.get_input_embeddings().weight  # tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_in_half_precision_keeps_each_modes(dtype):
    model = tiny("llama").to(dtype).train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    LMHead.check(model)
    assert [m.training for m in model.modules()] == before


def test_check_finds_what_nobody_declared():
    model = tiny("llama")
    LMHead.check(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * 1.01
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits otherwise"):
        LMHead.check(model)


def test_unknown_settings_are_refused_by_name():
    model = tiny("llama")
    model.config.logits_mup_width_multiplier = 24.0
    with pytest.raises(ValueError, match="LlamaForCausalLM has logits_mup_width_multiplier=24"):
        LMHead.from_model(model)
    model.config.logits_mup_width_multiplier = 1.0  # does nothing
    LMHead.check(model)


def test_models_without_such_a_head():
    encoder_decoder = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    for model, error, message in (
        (transformers.T5ForConditionalGeneration(encoder_decoder), ValueError, "decoder-only"),
        (tiny("llama").model, ValueError, "output embeddings, got LlamaModel"),
        (nn.Linear(4, 4), TypeError, "causal LM, got Linear"),
    ):
        with pytest.raises(error, match=message):
            LMHead.from_model(model)


class Quantised(torch.Tensor):
    """Its dtype looks like a float's."""


def test_heads_that_are_not_plain_tensors():
    weight = torch.zeros(8, 4)
    for value, message in (
        (weight.as_subclass(Quantised), "plain tensor, got Quantised"),
        (weight.to(torch.int8), "float32, bfloat16 or float16, got torch.int8"),
        (weight.double(), "float32, bfloat16 or float16, got torch.float64"),
        ([1.0], "must be a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            LMHead(value)  # type: ignore[arg-type]


def test_peft_heads():
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    body = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**settings))
    LMHead.check(body)

    saved = peft.LoraConfig(**settings, modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny("llama"), saved)
    head = LMHead.from_model(model)
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.add_(1)
    LMHead.check(model)
    with model.disable_adapter():  # the frozen start
        assert LMHead.from_model(model).weight is not head.weight
        LMHead.check(model)


def adapted_head(**settings):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["lm_head"], **settings}
    return peft.get_peft_model(tiny("llama"), peft.LoraConfig(**settings))


def test_lora_on_the_head():
    model = adapted_head(lora_alpha=6)
    head = LMHead.from_model(model)
    assert head.lora is not None and head.lora.scaling == 3.0
    assert not head.weight.requires_grad and head.lora.a.requires_grad
    with torch.no_grad():
        head.lora.b.normal_()  # it starts as 0
    LMHead.check(model)
    with model.disable_adapter():
        assert LMHead.from_model(model).lora is None
        LMHead.check(model)
    model.merge_adapter()
    assert LMHead.from_model(model).lora is None
    LMHead.check(model)


def test_two_loras_on_the_head():
    peft = pytest.importorskip("peft")
    model = adapted_head()
    second = peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["lm_head"])
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    head = LMHead.from_model(model)
    assert head.lora is not None and head.lora.a.shape[0] == 5
    with torch.no_grad():
        for b in model.get_base_model().get_output_embeddings().lora_B.values():
            b.weight.normal_()
    LMHead.check(model)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "a variant of LoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout=0 in training"),
    ],
)
def test_variants_of_lora_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(adapted_head(**settings).train())


def test_other_adapters_of_the_head_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=2, task_type="CAUSAL_LM", target_modules=["lm_head"])
    adapted = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match="LlamaForCausalLM is adapted by peft"):
        LMHead.from_model(adapted)


def test_a_head_is_frozen_and_says_what_it_is():
    head = LMHead(torch.zeros(8, 4), torch.zeros(8), 2.0, 3)
    assert repr(head) == "LMHead(8 x 4, bias, softcap=2.0, scale=3)"
    with pytest.raises(AttributeError):
        head.scale = 2.0  # type: ignore[misc]
    hidden = torch.randn(2, 3, 4)
    assert head.logits(hidden).shape == (2, 3, 8)
