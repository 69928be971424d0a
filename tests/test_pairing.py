"""A student's responses in the tokens of a teacher: cut samples, normalizing tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
import vocabularies
from tokenizers import normalizers

from dudi.pairing import Pairing

LANGUAGES = ("en", "vi", "th", "my", "km", "ta")


@pytest.fixture(scope="module")
def student() -> Any:
    return vocabularies.demo()


@pytest.fixture(scope="module")
def pairing(student: Any) -> Pairing:
    return Pairing(student, vocabularies.trained_byte_level())


def ids(tokenizer: Any, text: str, ends: bool = True) -> list[int]:
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*own, tokenizer.eos_token_id] if ends else own


def prefix(table: Any, found: list[int], row: int) -> bytes:
    """What the tokens before a row spell."""
    return b"".join(table[i] for i in found[:row])


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_pair_where_both_have_read_the_same(
    student: Any, pairing: Pairing, language: str
) -> None:
    texts = vocabularies.texts(language)[:20]
    responses = [ids(student, text) for text in texts]
    found = pairing(responses)
    assert not found.differs
    tables = [tokens.bytes for tokens in pairing.aligner]
    for own, other, rows, others in zip(
        responses, found.teacher_ids, found.student_rows, found.teacher_rows, strict=True
    ):
        assert other[-1] == pairing.teacher_eos and (rows[0], others[0]) == (0, 0)
        assert (rows[-1], others[-1]) == (len(own) - 1, len(other) - 1)  # both end
        for row, partner in zip(rows.tolist(), others.tolist(), strict=True):
            assert prefix(tables[0], own, row) == prefix(tables[1], other, partner)


def test_a_sample_that_was_cut_within_a_character_pairs_up_to_it(
    student: Any, pairing: Pairing
) -> None:
    whole = ids(student, "ok ", ends=False)
    half = [i for i, part in enumerate(pairing.aligner.student.bytes) if part == "ก".encode()[:1]]
    found = pairing([[*whole, *half], [*whole, student.convert_tokens_to_ids("<|user|>"), *whole]])
    for rows, teacher in zip(found.student_rows, found.teacher_ids, strict=True):
        assert pairing.teacher_tokenizer.decode(teacher) == "ok "
        assert rows.tolist()[0] == 0 and rows.max() < len(whole)
    assert not found.differs


def test_nothing_and_eos_alone(student: Any, pairing: Pairing) -> None:
    eos = student.eos_token_id
    found = pairing([[], [eos]])
    assert found.teacher_ids == [[], [pairing.teacher_eos]]
    assert [rows.tolist() for rows in found.student_rows] == [[], [0]]


def test_a_sentence_piece_student_adds_a_space_that_is_none() -> None:
    student = vocabularies.sentence_piece()
    pairing = Pairing(student, vocabularies.demo())
    found = pairing([ids(student, "Wi-Fi network")])
    assert pairing.teacher_tokenizer.decode(found.teacher_ids[0]).startswith("Wi-Fi network")
    assert found.teacher_rows[0][0] == 0 and not found.differs


def test_a_teacher_that_normalizes_is_told_of(student: Any) -> None:
    teacher = vocabularies.byte_level()
    teacher._tokenizer.normalizer = normalizers.NFC()
    found = Pairing(student, teacher)([ids(student, "cafe\u0301"), ids(student, "cafe")])
    assert found.differs == [0] and not len(found.student_rows[0])
    assert len(found.student_rows[1])


def test_a_teacher_must_be_able_to_end(student: Any) -> None:
    teacher = vocabularies.byte_level()
    teacher.eos_token = None
    with pytest.raises(ValueError, match="teacher's tokenizer must have an end-of-sequence token"):
        Pairing(student, teacher)
