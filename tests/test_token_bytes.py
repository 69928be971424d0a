"""Bytes of tokens: what they join to is the text, for each kind of tokenizer."""

from __future__ import annotations

import pytest
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer
from vocabularies import BUILT, INSTALLED, every_language, ids

from dudi_kernels.vocabulary.token_bytes import (
    plain_encoder,
    read,
    special_roles,
    token_bytes,
    tokenizer_hash,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def joined(tokenizer, text):
    table = token_bytes(tokenizer)
    return b"".join(table[i] for i in ids(tokenizer, text))


@pytest.mark.parametrize("name", [*BUILT, *INSTALLED])
def test_bytes_join_to_the_text(name):
    tokenizer = (BUILT | INSTALLED)[name]()
    vocabulary = read(tokenizer)
    for text in every_language(40):
        got = b"".join(vocabulary.bytes[i] for i in ids(tokenizer, text))
        assert got == b" " * vocabulary.adds_space + text.encode()
    assert vocabulary.adds_space == (name in ("sentence_piece", "metaspace"))
    assert len(vocabulary.bytes) == 1 + max(tokenizer.get_vocab().values())
    assert vocabulary.hash == tokenizer_hash(tokenizer)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("text", ["water", " water", "\nปลา 1"])
def test_the_plain_encoder_adds_nothing(name, text):
    tokenizer = BUILT[name]()
    tokenizer("x y z", max_length=1, truncation=True)  # leaves that in its settings
    found = plain_encoder(tokenizer).encode(text).ids
    table = token_bytes(tokenizer)
    assert b"".join(table[i] or b"" for i in found) == text.encode()


TRAINED = vocabularies.trained_byte_level()
TABLE = token_bytes(TRAINED)


@PROPERTY
@given(st.text(max_size=30))
def test_any_text(text):
    assert b"".join(TABLE[i] or b"" for i in ids(TRAINED, text)) == text.encode() or (
        "<|endoftext|>" in text
    )


def test_half_characters_and_every_byte_are_there():
    table = token_bytes(vocabularies.trained_byte_level())
    assert {bytes([byte]) for byte in range(256)} <= set(table)
    pieces = token_bytes(vocabularies.sentence_piece())
    assert pieces[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
    assert read(vocabularies.sentence_piece()).byte_tokens == frozenset(range(3, 259))


def test_unigram_without_bytes():
    tokenizer = vocabularies.unigram()
    assert joined(tokenizer, "Cancel the call") == b" Cancel the call"
    assert read(tokenizer).adds_space and not read(tokenizer).byte_tokens


def test_special_tokens_have_no_text_and_added_ones_do():
    tokenizer = vocabularies.byte_level(["water"])
    tokenizer.add_tokens(["<think>", "déjà vu"])
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)], special_tokens=True)
    table = token_bytes(tokenizer)
    assert table[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"
    assert table[tokenizer.convert_tokens_to_ids("déjà vu")] == "déjà vu".encode()
    assert table[tokenizer.convert_tokens_to_ids("<|tool|>")] is None
    assert table[tokenizer.eos_token_id] is None


def test_roles_of_one_token_go_to_the_first():
    assert special_roles(vocabularies.trained_byte_level()) == {"eos": 0}  # pad is eos
    assert special_roles(vocabularies.sentence_piece()) == {"eos": 2, "bos": 1, "unk": 0}
    assert special_roles(vocabularies.trained_byte_level().backend_tokenizer) == {}


def test_the_hash_is_of_what_matters(tmp_path):
    tokenizer = vocabularies.byte_level(["water"])
    before = tokenizer_hash(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer("x", padding="max_length", max_length=5, truncation=True)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer.add_tokens(["<think>"])
    assert tokenizer_hash(tokenizer) != before
    assert tokenizer_hash(vocabularies.byte_level(["water"], eos="</s>")) != before


def test_what_is_not_understood_is_named():
    with pytest.raises(ValueError, match="got continuing_subword_prefix '##' in a WordPiece model"):
        token_bytes(vocabularies.word_piece())
    with pytest.raises(ValueError, match="got a WordLevel model with no decoder"):
        token_bytes(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(TypeError, match=r"tokenizer must be a fast tokenizer .* got dict"):
        token_bytes({})
