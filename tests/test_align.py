"""Pairs of rows: by hand, against every boundary by decoding, and on the embedded languages."""

from __future__ import annotations

import itertools

import pytest
import torch
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import ALL, TEXT_LANGUAGES, byte_level, ids, texts

from dudi_kernels import Aligner, Tokens, align_responses

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
TOKENS: dict[str, Tokens] = {}


def tokens(name: str) -> Tokens:
    if name not in TOKENS:
        TOKENS[name] = Tokens.of(ALL[name]())
    return TOKENS[name]


def with_eos(name: str, text: str) -> list[int]:
    tokenizer = ALL[name]()
    return [*ids(tokenizer, text), tokenizer.eos_token_id]


def lists(alignment) -> list[list[tuple[int, int]]]:
    rows = zip(alignment.student_rows, alignment.teacher_rows, strict=True)
    return [list(zip(a.tolist(), b.tolist(), strict=True)) for a, b in rows]


TABLE = Tokens(
    [b"a", b"b", b"ab", b"abab", b"", None, b"\xe0", b"\xb8", b"\xe0\xb8", None], frozenset([9])
)
SPACED = Tokens([b" a", b"a", b"b", b" "], frozenset(), adds_space=True)


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        ([0, 1, 0, 1], [2, 2], [(0, 0), (2, 1)]),
        ([3], [0, 1, 0, 1], [(0, 0)]),
        ([0, 1], [0, 1], [(0, 0), (1, 1)]),
        ([2, 2, 9], [0, 1, 2, 9], [(0, 0), (1, 2), (2, 3)]),  # eos with eos
        ([2, 9], [0, 1], [(0, 0)]),  # one was cut: eos has no partner
        ([9], [9], [(0, 0)]),
        ([9], [], []),
        ([], [], []),
        ([4, 2, 4], [2], [(1, 0)]),  # tokens without bytes predict nothing that both can see
        ([6, 7, 2], [6, 7, 0, 1], [(0, 0), (1, 1), (2, 2)]),  # within a character
        ([6, 7, 2], [8, 2], [(0, 0), (2, 1)]),
    ],
)
def test_by_hand(student, teacher, wanted):
    found = Aligner(TABLE, TABLE)([student], [teacher])
    assert lists(found) == [wanted] and not found.differs
    assert found.share.tolist() == [len(wanted) / max(len(student), 1)]
    mirrored = lists(Aligner(TABLE, TABLE)([teacher], [student]))[0]
    assert mirrored == [(b, a) for a, b in wanted]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([0, 1], [0, 0]),
        ([0, 1], [0]),
        ([0, 5], [0, 5]),  # special, and not eos
        ([9, 0], [9, 0]),  # eos within
        ([99], [0]),  # no token has this id
    ],
)
def test_other_bytes_are_reported(student, teacher):
    aligner = Aligner(TABLE, TABLE)
    found = aligner([[2], student, [2]], [[2], teacher, [2]], max_mismatch=0.5)
    assert found.differs == [1]
    assert lists(found) == [[(0, 0)], [], [(0, 0)]]
    assert found.share.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"share of 0.1: 1 of 3 differ \(sequences 1\)"):
        aligner([[2], student, [2]], [[2], teacher, [2]])


def test_the_space_before_a_text():
    plain = SPACED._replace(adds_space=False)
    for student, teacher in ((SPACED, plain), (plain, SPACED)):
        wanted = [[(0, 0), (1, 1)]]
        own, other = ([0, 2], [1, 2]) if student is SPACED else ([1, 2], [0, 2])
        assert lists(Aligner(student, teacher)([own], [other])) == wanted
    assert lists(Aligner(SPACED, plain)([[3, 1, 2]], [[1, 2]])) == [[(1, 0), (2, 1)]]
    assert lists(Aligner(SPACED, SPACED)([[0, 2]], [[0, 2]])) == [[(0, 0), (1, 1)]]
    assert Aligner(plain, plain)([[0]], [[1]], max_mismatch=1).differs == [0]


def naive(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int]]:
    own = [len(b"".join(student[:i])) for i in range(len(student))]
    other = [len(b"".join(teacher[:j])) for j in range(len(teacher))]
    return [(i, j) for i, a in enumerate(own) for j, b in enumerate(other) if a == b]


@st.composite
def splits(draw):
    """Two ways to cut the same bytes."""
    text = draw(st.text(max_size=12)).encode()
    cut = st.sets(st.integers(1, max(len(text) - 1, 1)))

    def parts():
        places = sorted({0, len(text)} | {at for at in draw(cut) if at < len(text)})
        return [text[a:b] for a, b in itertools.pairwise(places)]

    return parts(), parts()


@PROPERTY
@given(splits())
def test_every_shared_boundary(pair):
    student, teacher = pair
    table = [*student, *teacher]
    aligner = Aligner(Tokens(table), Tokens(table))
    own = range(len(student))
    found = aligner([list(own)], [list(range(len(student), len(table)))])
    assert lists(found) == [naive(student, teacher)]


PAIRS = [
    ("demo", "byte_level"),
    ("demo", "sentence_piece"),
    ("metaspace", "byte_level"),
    ("demo", "qwen"),
    ("demo", "qwen3_6"),
    ("demo", "tekken"),
    ("qwen", "tekken"),
    ("smollm2", "demo"),
    ("smollm2", "qwen"),
]


@pytest.mark.parametrize("language", TEXT_LANGUAGES)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_real_tokenizers(student, teacher, language):
    some = texts(language)[:200]
    own = [with_eos(student, text) for text in some]
    other = [with_eos(teacher, text) for text in some]
    sides = tokens(student), tokens(teacher)
    found = Aligner(*sides)(own, other, max_mismatch=0)
    assert not found.differs and bool((found.share > 0).all())
    for i, rows in enumerate(lists(found)):
        assert rows[0] == (0, 0) or sides[0].adds_space or sides[1].adds_space  # a lone space
        assert rows[-1] == (len(own[i]) - 1, len(other[i]) - 1)
        for a, b in rows[:10]:  # both models have read the same
            assert read_so_far(sides[0], own[i][:a]) == read_so_far(sides[1], other[i][:b])


def read_so_far(side: Tokens, before: list[int]) -> bytes:
    text = b"".join(side.bytes[i] or b"" for i in before)
    return text.removeprefix(b" ") if side.adds_space else text


def test_tokenizers_and_tensors():
    student, teacher = byte_level(["water"]), byte_level(["wat", "fish"], eos="</s>")
    text = "water!"
    own = torch.tensor([*ids(student, text), student.eos_token_id])
    other = [*ids(teacher, text), teacher.eos_token_id]
    found = align_responses([own], [other], student, teacher)
    assert lists(found) == [[(0, 0), (1, 5), (2, 6)]]
    mark = ids(teacher, "!")  # taken for an end, it says nothing: the texts differ
    with pytest.raises(ValueError, match="1 of 1 differ"):
        align_responses([own], [other[:-1]], student, teacher, teacher_eos=mark)
    (rows,) = lists(
        align_responses([own[[0, 2]]], [other[:-1]], student, teacher, teacher_eos=mark)
    )
    assert rows == [(0, 0), (1, 5)]  # eos with what ends the other


def test_a_normalizing_tokenizer_is_reported():
    from tokenizers import normalizers

    student = byte_level(["water"])
    student.backend_tokenizer.normalizer = normalizers.Lowercase()
    teacher = vocabularies.byte_level(["water"], eos="</s>")
    said = ["water", "WATER"]
    own, other = ([ids(side, text) for text in said] for side in (student, teacher))
    found = align_responses(own, other, student, teacher, max_mismatch=0.5)
    assert found.differs == [1] and lists(found) == [[(0, 0)], []]


def test_bad_input_is_named():
    aligner = Aligner(TABLE, TABLE)
    with pytest.raises(ValueError, match="teacher_ids must have 1 sequences as student_ids, got 2"):
        aligner([[0]], [[0], [0]])
    with pytest.raises(
        ValueError, match=r"student_ids\[0\] must not be negative, got -100 at row 1"
    ):
        aligner([[0, -100]], [[0]])
    with pytest.raises(TypeError, match=r"teacher_ids\[0\] must be integers, got torch.float32"):
        aligner([[0]], [[0.5]])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=r"student_ids\[0\] must be one sequence of ids, got shape"
    ):
        aligner([[[0]]], [[0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"max_mismatch must be in \[0, 1\], got 2"):
        aligner([[0]], [[0]], max_mismatch=2)


def test_linear_time_on_long_responses():
    """A quadratic walk over 200,000 tokens would take minutes."""
    own, other = [0, 1] * 100_000, [2] * 100_000
    found = Aligner(TABLE, TABLE)([own], [other])
    assert len(found.student_rows[0]) == 100_000
