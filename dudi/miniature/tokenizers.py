"""Small tokenizers of the kinds that large models have, from the embedded strings.

Qwen: byte-level BPE without a BOS (the demo's own), Qwen3 with an empty thought before each answer.
Llama 3: byte-level BPE with a BOS and headers. Gemma: SentencePiece-style with byte fallback, its
turn's end not its EOS, no system role. Models that are not taught to chat end texts otherwise.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dudi.demo_data import CHAT_TEMPLATE, LANGUAGES, PAD, data_path, ui_strings
from dudi.miniature.architectures import GEMMA2, GEMMA3, LLAMA3, QWEN2_5, QWEN3, Family

TOKENS = 1200  # of a trained one: characters of ten scripts fall into bytes, words into parts
STRINGS = 40  # of each language, to train it
THOUGHT = "<think>\n\n</think>\n\n"

LLAMA_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
GEMMA_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant') -}}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
# A thought before the last answer, always; before a new one, unless thinking is left to the model.
QWEN3_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set thought = THOUGHT if loop.last and message['role'] == 'assistant' else '' -%}"
    "{{- '<|' + message['role'] + '|>' + thought + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- THOUGHT -}}{%- endif -%}"
    "{%- endif -%}"
).replace("THOUGHT", repr(THOUGHT).replace('"', "'"))


def small_tokenizer(family: Family, chats: bool) -> Any:
    """A new tokenizer of the family's kind; of an unknown family, one of its own by its name."""
    if family in (QWEN2_5, QWEN3):
        return _qwen(family, chats)
    if family in (GEMMA2, GEMMA3):
        return _gemma(family, chats)
    return _llama(family, chats)


def _qwen(family: Family, chats: bool) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(data_path("tokenizer"))
    if family is QWEN3:
        tokenizer.add_tokens(["<think>", "</think>", "<tool_response>", "</tool_response>"])
    tokenizer.chat_template = QWEN3_TEMPLATE if family is QWEN3 else CHAT_TEMPLATE
    if not chats:
        tokenizer.eos_token = PAD  # as <|endoftext|>, which pads too
    return tokenizer


def _llama(family: Family, chats: bool) -> Any:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    built.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>"]
    if family is not LLAMA3:  # so that tokenizers of two unknown families differ
        specials.append(f"<|{family.name}|>")
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    built.train_from_iterator(_texts(), trainer)
    return _wrapped(
        built,
        LLAMA_TEMPLATE if chats else None,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>" if chats else "<|end_of_text|>",
    )


def _gemma(family: Family, chats: bool) -> Any:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    built = Tokenizer(_pieces(tuple(specials)))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.add_special_tokens(specials)
    if family is GEMMA3:
        built.add_special_tokens(["<image_soft_token>"])
    roles = {f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk")}
    return _wrapped(built, GEMMA_TEMPLATE if chats else None, **roles)


@lru_cache(maxsize=1)
def _pieces(specials: tuple[str, ...]) -> Any:
    """Special tokens, the 256 bytes and what merging finds, where a mark stands for a space."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, limit_alphabet=150, show_progress=False)
    trained.train_from_iterator(_texts(), trainer)
    model = json.loads(trained.to_str())["model"]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    return models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )


def _texts() -> list[str]:
    strings = ui_strings()
    return [
        s[language] for language in ("en", *LANGUAGES) for s in strings[:STRINGS] if s[language]
    ]


def _wrapped(built: Tokenizer, template: str | None, **roles: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, clean_up_tokenization_spaces=False, padding_side="left", **roles
    )
    tokenizer.chat_template = template
    return tokenizer
