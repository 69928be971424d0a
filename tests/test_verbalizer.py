"""Verbalizer: dense float64 matrices as the oracle, tokenizers of every kind, mistakes named."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from vocabularies import BUILT, INSTALLED, byte_level, ids

from dudi_kernels import Verbalizer
from dudi_kernels.vocabulary import token_match
from dudi_kernels.vocabulary.token_bytes import plain_encoder, token_bytes

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SIZES = st.integers(1, 6)
SHARE = 8  # weights in eighths: products of three are exact in fp32
MINUTE = 60  # the most that 152k x 130k may take


def dense(verbalizer: Verbalizer) -> torch.Tensor:
    """M (U, K), read entry by entry."""
    out = torch.zeros(verbalizer.teacher_size, verbalizer.num_classes, dtype=torch.float64)
    begins = verbalizer.indptr.tolist()
    for k in range(verbalizer.num_classes):
        for entry in range(begins[k], begins[k + 1]):
            out[verbalizer.teacher_ids[entry], k] += verbalizer.weights[entry].double()
    return out


def from_dense(matrix: torch.Tensor, **settings) -> Verbalizer:
    rows, columns = matrix.nonzero(as_tuple=True)
    teacher_size, student_size = matrix.shape
    return Verbalizer.from_coo(
        rows,
        columns,
        matrix[rows, columns],
        teacher_size=teacher_size,
        student_size=student_size,
        **settings,
    )


@st.composite
def matrices(draw, rows=None, columns=None):
    """Rows of eighths that sum to at most 1."""
    rows, columns = rows or draw(SIZES), columns or draw(SIZES)
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in draw(st.lists(st.integers(0, columns - 1), max_size=SHARE)):
            out[row, column] += 1 / SHARE
    return out


@st.composite
def chains(draw):
    sizes = [draw(SIZES) for _ in range(4)]
    return [draw(matrices(a, b)) for a, b in itertools.pairwise(sizes)]


@PROPERTY
@given(matrices())
def test_holds_the_matrix_and_conserves_mass(matrix):
    verbalizer = from_dense(matrix)
    assert torch.equal(dense(verbalizer), matrix)
    assert torch.equal(verbalizer.mapped.double(), matrix.sum(1))
    p = torch.rand(3, len(matrix), dtype=torch.float64).softmax(1)
    torch.testing.assert_close(verbalizer.project(p), p @ matrix)
    landed = verbalizer.project(p).sum(1) + p @ (1 - verbalizer.mapped.double())
    torch.testing.assert_close(landed, torch.ones(3, dtype=torch.float64))
    has = matrix.any(0)
    own = torch.arange(matrix.shape[1])
    assert torch.equal(verbalizer.student_class, torch.where(has, own, -1))


@PROPERTY
@given(matrices(), st.randoms(use_true_random=False))
def test_what_is_named_twice_adds_up_in_any_order(matrix, random):
    entries = [
        (row, column, 1 / SHARE)
        for row, values in enumerate((matrix * SHARE).int().tolist())
        for column, count in enumerate(values)
        for _ in range(count)
    ]
    random.shuffle(entries)
    columns = [list(values) for values in zip(*entries, strict=True)] or [[], [], []]
    sizes = {"teacher_size": matrix.shape[0], "student_size": matrix.shape[1]}
    assert torch.equal(dense(Verbalizer.from_coo(*columns, **sizes)), matrix)


@PROPERTY
@given(chains())
def test_composition_is_the_product_and_associative(chain):
    a, b, c = map(from_dense, chain)
    assert torch.equal(dense(a.compose(b)), chain[0] @ chain[1])
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    for name in ("indptr", "teacher_ids", "weights", "student_class"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@PROPERTY
@given(matrices(), st.data())
def test_permuted_vocabularies_permute_the_map(matrix, data):
    rows = torch.tensor(data.draw(st.permutations(range(matrix.shape[0]))))
    columns = torch.tensor(data.draw(st.permutations(range(matrix.shape[1]))))
    permuted = from_dense(matrix[rows][:, columns])
    original = from_dense(matrix)
    assert torch.equal(dense(permuted), dense(original)[rows][:, columns])
    assert torch.equal(permuted.mapped, original.mapped[rows])
    assert torch.equal(permuted.matched, original.matched[columns])


def test_products_of_rounded_rows_stay_within_a_token():
    third = torch.full((3, 3), 1 / 3 + 3e-7)
    verbalizer = from_dense(third)
    for _ in range(10):
        verbalizer = verbalizer.compose(from_dense(third))
    assert verbalizer.mapped.max() <= 1 + 1e-6


def test_identity_composes_to_the_same():
    matrix = torch.tensor([[0.5, 0.5, 0], [0, 0, 0.25]])
    verbalizer = from_dense(matrix)
    for same in (
        Verbalizer.identity(2).compose(verbalizer),
        verbalizer.compose(Verbalizer.identity(3)),
    ):
        assert torch.equal(dense(same), matrix.double())


@pytest.mark.parametrize(("teacher", "student"), [(5, 5), (5, 3), (3, 5)])
def test_prefix_is_slicing(teacher, student):
    verbalizer = Verbalizer.prefix(teacher, student)
    n = min(teacher, student)
    assert verbalizer.unmatched == "renormalize" and verbalizer.prefix_size == n
    assert torch.equal(dense(verbalizer), torch.eye(teacher, student).double())
    assert verbalizer.student_class.tolist() == [*range(n), *[-1] * (student - n)]


def test_prefix_size_is_of_prefixes_alone():
    assert Verbalizer.identity(4).prefix_size == 4
    for entries in ([(0, 1), (1, 0)], [(1, 1)], [(0, 0), (1, 0)], [(0, 0), (2, 2)]):
        rows, columns = map(list, zip(*entries, strict=True))
        made = Verbalizer.from_coo(rows, columns, [1.0] * len(rows), teacher_size=3, student_size=3)
        assert made.prefix_size is None
    assert Verbalizer.from_coo([0], [0], [0.5], teacher_size=1, student_size=1).prefix_size is None


def direct(**changes):
    """Two classes of three student tokens; teacher token 1 is shared."""
    given: dict[str, Any] = {
        "teacher_size": 3,
        "student_size": 3,
        "num_classes": 2,
        "indptr": torch.tensor([0, 2, 4]),
        "teacher_ids": torch.tensor([0, 1, 1, 2]),
        "weights": torch.tensor([1.0, 0.5, 0.5, 0.25]),
        "student_class": torch.tensor([0, 1, 1]),
    }
    return Verbalizer(**(given | changes))


def test_a_class_has_tokens_of_both_sides():
    verbalizer = direct()
    assert verbalizer.student_class.tolist() == [0, 1, 1]
    untaught = direct(weights=torch.tensor([0.0, 0.0, 0.5, 0.25]))
    assert untaught.student_class.tolist() == [-1, 1, 1] and untaught.teacher_ids.tolist() == [1, 2]
    assert untaught.entry_class.tolist() == [1, 1] and untaught.indptr.tolist() == [0, 0, 2]
    unlearnt = direct(student_class=torch.tensor([0, -1, 0]))
    assert unlearnt.teacher_ids.tolist() == [0, 1] and unlearnt.mapped.tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher_size": 0}, ValueError, "teacher_size must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer"),
        ({"unmatched": "drop"}, ValueError, "unmatched must be one of bucket, renormalize"),
        ({"indptr": [0, 2, 4]}, TypeError, "indptr must be a tensor, got list"),
        ({"indptr": torch.tensor([0, 4])}, ValueError, r"indptr must have shape \(3,\), got \(2,"),
        ({"indptr": torch.tensor([0, 5, 4])}, ValueError, "indptr must rise from 0 to 4"),
        ({"indptr": torch.tensor([0, 2, 3])}, ValueError, "indptr must rise from 0 to 4"),
        (
            {"teacher_ids": torch.tensor([0, 1, 1, 3])},
            ValueError,
            r"teacher_ids must be in \[0, 3\), got 3 at 3",
        ),
        (
            {"teacher_ids": torch.tensor([1, 1, 1, 2])},
            ValueError,
            "teacher_ids must rise within a class, got 1 after 1 in class 0",
        ),
        ({"teacher_ids": torch.tensor([0, 1, 1, 2]).int()}, TypeError, "teacher_ids must be torch"),
        ({"weights": torch.ones(4).double()}, TypeError, "weights must be torch.float32"),
        (
            {"weights": torch.tensor([1.0, 0.75, 0.5, 0.25])},
            ValueError,
            "at most 1 for each teacher token, those of token 1 sum to 1.25",
        ),
        (
            {"weights": torch.tensor([1.0, -0.5, 0.5, 0.25])},
            ValueError,
            "weights must be finite and not negative, got -0.5 at 1",
        ),
        (
            {"weights": torch.tensor([1.0, 0.5, float("nan"), 0.25])},
            ValueError,
            "weights must be finite and not negative, got nan at 2",
        ),
        (
            {"student_class": torch.tensor([0, 1, 2])},
            ValueError,
            r"student_class must be in \[-1, 2\), got 2 at 2",
        ),
        ({"student_class": None}, ValueError, "student_class must be given where num_classes"),
    ],
)
def test_bad_maps_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        direct(**changes)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        (([0, 4], [0, 0], [1.0, 1.0]), ValueError, r"teacher_ids must be in \[0, 4\), got 4 at 1"),
        (([0, 1], [-1, 0], [1.0, 1.0]), ValueError, r"student_ids must be in \[0, 3\), got -1 at"),
        (([0], [0, 1], [1.0]), ValueError, r"student_ids must have shape \(1,\)"),
        (([0.5], [0], [1.0]), TypeError, "teacher_ids must be integers"),
        (([2, 2], [0, 0], [0.75, 0.75]), ValueError, "those of token 2 sum to 1.5"),
        (([0], [0], [float("inf")]), ValueError, "got inf at 0"),
    ],
)
def test_bad_entries_are_named(entries, error, message):
    with pytest.raises(error, match=message):
        Verbalizer.from_coo(*entries, teacher_size=4, student_size=3)


def test_bad_compositions_are_named():
    identity = Verbalizer.identity(3)
    with pytest.raises(ValueError, match="other must have a teacher_size of 3"):
        identity.compose(Verbalizer.identity(4))
    with pytest.raises(ValueError, match="one student token for each class"):
        direct().compose(identity)
    with pytest.raises(ValueError, match="other must have unmatched='bucket' as the first"):
        identity.compose(Verbalizer.identity(3, unmatched="renormalize"))
    with pytest.raises(ValueError, match="the first's student tokenizer"):
        replace(identity, student_hash="a").compose(replace(identity, teacher_hash="b"))
    with pytest.raises(TypeError, match="other must be a Verbalizer, got int"):
        identity.compose(3)  # type: ignore[arg-type]
    composed = identity.compose(direct())  # any classes at the end
    assert torch.equal(dense(composed), dense(direct()))
    assert composed.student_class.tolist() == [0, 1, 1]


def test_immutable_and_moved():
    verbalizer = direct()
    with pytest.raises(AttributeError):
        verbalizer.weights = torch.ones(4)
    moved = verbalizer.to("meta")
    assert moved.device.type == "meta" and verbalizer.device.type == "cpu"
    assert repr(verbalizer) == "Verbalizer(3 -> 3, 2 classes, 4 weights, unmatched='bucket')"


def assert_same(one: Verbalizer, other: Verbalizer) -> None:
    for name in Verbalizer.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_round_trip(tmp_path):
    path = tmp_path / "map.safetensors"
    for verbalizer in (
        direct(unmatched="renormalize"),
        Verbalizer.from_tokenizers(byte_level(["water"]), byte_level(["fish"], eos="</s>")),
    ):
        verbalizer.save(path)
        assert_same(Verbalizer.load(path), verbalizer)
    assert [file.name for file in tmp_path.iterdir()] == ["map.safetensors"]


def test_changed_tokenizers_are_named(tmp_path):
    path = tmp_path / "map.safetensors"
    teacher, student = byte_level(["water"]), byte_level(["fish"], eos="</s>")
    Verbalizer.from_tokenizers(teacher, student).save(path)
    Verbalizer.load(path, teacher, student)
    with pytest.raises(ValueError, match=r"teacher_tokenizer must be the one .* has changed"):
        Verbalizer.load(path, student, student)
    student.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"student_tokenizer must be the one .* has changed"):
        Verbalizer.load(path, teacher, student)
    Verbalizer.identity(3).save(path)  # knows of none
    Verbalizer.load(path, teacher, student)


def test_bad_files_are_named(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "map.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="must be a saved verbalizer, got a broken file"):
        Verbalizer.load(path)
    save_file({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="of format 1, got None"):
        Verbalizer.load(path)
    save_file({"weights": torch.ones(1)}, path, {"format": "1"})
    with pytest.raises(ValueError, match="must hold indptr"):
        Verbalizer.load(path)
    with pytest.raises(FileNotFoundError):
        Verbalizer.load(tmp_path / "absent")


def naive_first(student, table: list[bytes | None], text: bytes) -> set[int]:
    """Student ids that a text may go to: of its very bytes, or first in the tokenization, or the
    longest that it begins with."""
    if exact := {i for i, token in enumerate(table) if token == text}:
        return exact
    try:
        first = student.encode(text.decode(), add_special_tokens=False).ids[:1]
    except UnicodeDecodeError:
        first = []
    if first and table[first[0]] and text.startswith(table[first[0]] or b""):
        return set(first)
    longest = max((len(token) for token in table if token and text.startswith(token)), default=0)
    return {i for i, token in enumerate(table) if longest and token == text[:longest]}


NAMES = [(a, b) for a in BUILT for b in BUILT if a != b and a != "demo"]


@pytest.mark.parametrize(("teacher_name", "student_name"), NAMES)
def test_tokens_go_to_the_first_of_their_text(teacher_name, student_name):
    teacher, student = BUILT[teacher_name](), BUILT[student_name]()
    verbalizer = Verbalizer.from_tokenizers(teacher, student)
    matrix = dense(verbalizer)
    table, encoder = token_bytes(student), plain_encoder(student)
    for i, text in enumerate(token_bytes(teacher)):
        if i == teacher.eos_token_id:
            assert matrix[i].nonzero().flatten().tolist() == [student.eos_token_id]
        elif text is None:
            assert i in (teacher.bos_token_id, teacher.unk_token_id, teacher.pad_token_id)
        else:
            got = set(matrix[i].nonzero().flatten().tolist())
            assert len(got) == 1 and got <= naive_first(encoder, table, text), text
            assert matrix[i].sum() == 1


def test_byte_tokens_are_for_what_no_other_says():
    student = vocabularies.sentence_piece()
    letter = byte_level().convert_tokens_to_ids("e")
    verbalizer = Verbalizer.from_tokenizers(byte_level(), student)
    (found,) = dense(verbalizer)[letter].nonzero().flatten().tolist()
    assert found == student.convert_tokens_to_ids("e") != student.convert_tokens_to_ids("<0x65>")


def test_no_space_is_put_before():
    """' water' and 'water' are two tokens: the one in the middle of a word has no space."""
    student = vocabularies.sentence_piece()
    teacher = byte_level(["qwertz", " qwertz"])
    matrix = dense(Verbalizer.from_tokenizers(teacher, student))
    table = token_bytes(student)
    for text in ("qwertz", " qwertz"):
        first = table[matrix[ids(teacher, text)[0]].argmax()]
        assert first is not None and text.encode().startswith(first)


def test_special_tokens_pair_by_role_alone():
    teacher, student = byte_level(eos="<|im_end|>"), byte_level(["fish"], eos="</s>")
    for tokenizer in (teacher, student):
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tool = teacher.convert_tokens_to_ids("<|tool|>")
    matrix = dense(Verbalizer.from_tokenizers(teacher, student))
    assert matrix[teacher.eos_token_id, student.eos_token_id] == 1
    assert not matrix[tool].any()
    pairs = {tool: student.eos_token_id}
    matrix = dense(Verbalizer.from_tokenizers(teacher, student, specials=pairs))
    assert matrix[tool, student.eos_token_id] == 1
    with pytest.raises(ValueError, match=r"specials must have student ids in \[0, .*got 9999"):
        Verbalizer.from_tokenizers(teacher, student, specials={tool: 9999})


def test_a_token_no_prefix_of_which_exists_is_unmatched():
    student = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1}, merges=[]))
    student.decoder = byte_level().backend_tokenizer.decoder
    teacher = byte_level(["a", "ab"])
    verbalizer = Verbalizer.from_tokenizers(teacher, student)
    assert verbalizer.mapped[ids(teacher, "ab")[0]] == 1  # begins with "a"
    assert verbalizer.mapped[teacher.convert_tokens_to_ids("b")] == 0
    assert verbalizer.mapped[teacher.eos_token_id] == 0


def test_the_same_tokenizer_is_the_identity():
    verbalizer = Verbalizer.from_tokenizers(
        byte_level(), byte_level(), teacher_size=300, student_size=280
    )
    assert verbalizer.prefix_size == 280 and verbalizer.teacher_hash == verbalizer.student_hash
    with pytest.raises(ValueError, match="teacher_size must be at least 257, got 200"):
        Verbalizer.from_tokenizers(byte_level(), byte_level(), teacher_size=200)


def test_cache(tmp_path, monkeypatch):
    teacher, student = byte_level(["water"]), byte_level(["fish"], eos="</s>")
    cache = tmp_path / "maps"
    made = Verbalizer.from_tokenizers(teacher, student, cache_dir=cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(token_match, "first_tokens", None)  # not called again
        assert_same(Verbalizer.from_tokenizers(teacher, student, cache_dir=cache), made)
    file.write_bytes(file.read_bytes()[:-9])
    assert_same(Verbalizer.from_tokenizers(teacher, student, cache_dir=cache), made)
    assert_same(Verbalizer.load(file, teacher, student), made)
    Verbalizer.from_tokenizers(teacher, student, cache_dir=cache, unmatched="renormalize")
    Verbalizer.from_tokenizers(student, teacher, cache_dir=cache)
    assert len(list(cache.iterdir())) == 3


TEACHER_WORDS = ["water", " water", "fish", " fish", "air", " air", "yes", " yes", "no", " no"]
STUDENT_WORDS = ["air", " air", "ikan", " ikan", "ปลา", "น", "water", " water", "ya", " ya"]


@pytest.fixture
def pair():
    return byte_level(TEACHER_WORDS), byte_level(STUDENT_WORDS, eos="</s>")


def at(tokenizer, text: str) -> int:
    """The first token of a text."""
    return ids(tokenizer, text)[0]


def test_lexicon_moves_a_share(pair):
    teacher, student = pair
    base = dense(Verbalizer.from_tokenizers(teacher, student))
    pairs = [("fish", "ikan"), ("fish", "ปลา"), ("water", "air"), ("unknown", "ya")]
    verbalizer = Verbalizer.from_lexicon(pairs, teacher, student, share=0.25)
    wanted = base.clone()
    for form in ("fish", " fish"):
        row = at(teacher, form)
        wanted[row] *= 0.75
        wanted[row, at(student, form.replace("fish", "ikan"))] += 0.125
        wanted[row, at(student, "ปลา")] += 0.125  # Thai has no spaces between words
    for form in ("water", " water"):
        row = at(teacher, form)
        wanted[row] *= 0.75
        wanted[row, at(student, form.replace("water", "air"))] += 0.25
    torch.testing.assert_close(dense(verbalizer), wanted)
    assert verbalizer.teacher_hash and verbalizer.student_hash
    everything = dense(Verbalizer.from_lexicon(pairs, teacher, student, share=1))
    assert everything[at(teacher, "water"), at(student, "air")] == 1


def test_lexicon_on_a_base(pair):
    teacher, student = pair
    sizes: dict[str, Any] = {"teacher_size": 300, "student_size": 310}
    base = Verbalizer.from_tokenizers(teacher, student, **sizes, unmatched="renormalize")
    verbalizer = Verbalizer.from_lexicon([("water", "air")], teacher, student, base=base)
    assert verbalizer.teacher_size == 300 and verbalizer.unmatched == "renormalize"
    assert dense(verbalizer)[at(teacher, "water"), at(student, "air")] == 0.5


def test_bad_lexicons_are_named(pair):
    make = Verbalizer.from_lexicon
    with pytest.raises(ValueError, match="none of 1 is"):
        make([("unknown", "air")], *pair)
    with pytest.raises(ValueError, match=r"share must be in \[1e-06, 1\], got 0"):
        make([("water", "air")], *pair, share=0)
    with pytest.raises(ValueError, match=r"pairs\[0\] must be words, got '' at 1"):
        make([("water", "")], *pair)
    with pytest.raises(ValueError, match=r"pairs\[0\] must be two words, got 3"):
        make([("water", "air", "น")], *pair)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"pairs\[0\] must be a list of words, got 'water'"):
        make(["water"], *pair)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="base must have a teacher_size of at least"):
        make([("water", "air")], *pair, base=Verbalizer.identity(9))
    other = Verbalizer.from_tokenizers(pair[1], pair[1], teacher_size=999, student_size=999)
    with pytest.raises(ValueError, match="base must be a map for teacher_tokenizer"):
        make([("water", "air")], *pair, base=other)


def test_concepts_share_a_class(pair):
    teacher, student = pair
    base = dense(Verbalizer.from_tokenizers(teacher, student))
    verbalizer = Verbalizer.from_concepts([["water", "air"], ["fish", "ปลา"]], teacher, student)
    forms = ("water", " water", "air", " air")
    concept = {at(student, form) for form in forms}
    named = min(concept)
    assert len(concept) == 4 and {int(verbalizer.student_class[i]) for i in concept} == {named}
    assert verbalizer.student_class[at(student, "ปลา")] == at(student, "f")  # "fish" is f, i, s, h
    matrix = dense(verbalizer)
    for form in forms:
        assert matrix[at(teacher, form)].nonzero().flatten().tolist() == [named]
    for word in ("ikan", "yes", " no", "!"):  # as in the base
        assert torch.equal(matrix[at(teacher, word)], base[at(teacher, word)])
    assert matrix.sum() == base.sum() and not verbalizer.one_token_each


def test_concepts_take_along_what_the_base_maps_to_them(pair):
    teacher, student = pair
    teacher.add_tokens(["water!"])  # the student has "water" and "!"
    verbalizer = Verbalizer.from_concepts([["water", "air"]], teacher, student)
    (found,) = dense(verbalizer)[at(teacher, "water!")].nonzero().flatten().tolist()
    assert found == verbalizer.student_class[at(student, "water")]


def test_a_token_of_two_concepts(pair):
    groups = [["fish", "ikan"], ["water", "fish"]]
    with pytest.raises(
        ValueError,
        match=r"groups\[1\] must not share tokens with groups\[0\]: teac"
        r"her token \d+ begins both 'fish' and 'fish'",
    ):
        Verbalizer.from_concepts(groups, *pair)
    first = Verbalizer.from_concepts(groups, *pair, clash="first")
    classes = first.student_class
    assert classes[at(pair[1], "fish")] == classes[at(pair[1], "ikan")]
    assert classes[at(pair[1], "water")] != classes[at(pair[1], "fish")]
    with pytest.raises(ValueError, match="clash must be one of error, first, got 'last'"):
        Verbalizer.from_concepts(groups, *pair, clash="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one list of words"):
        Verbalizer.from_concepts([], *pair)


def test_label_words(pair):
    teacher, student = pair
    labels = {"positive": ["yes", "ya"], "negative": ["no"]}
    verbalizer = Verbalizer.from_label_words(labels, teacher, student, student_size=400)
    assert verbalizer.num_classes == 2 and verbalizer.student_size == 400
    matrix = dense(verbalizer)
    assert [matrix[at(teacher, f)].tolist() for f in ("yes", " no")] == [[1, 0], [0, 1]]
    assert matrix.sum() == 5  # yes, " yes", the y of "ya", no, " no"; " ya" begins with a space
    assert verbalizer.student_class[at(student, " ya")] == 0
    assert verbalizer.student_class[at(student, "no")] == 1
    assert verbalizer.student_class[at(student, "water")] == -1
    with pytest.raises(ValueError, match="b must not share tokens with a: teacher token"):
        Verbalizer.from_label_words({"a": ["yes"], "b": ["yes"]}, teacher, student)
    with pytest.raises(ValueError, match=r"labels\['a'\] must not be empty"):
        Verbalizer.from_label_words({"a": []}, teacher, student)


def test_coverage():
    verbalizer = Verbalizer.from_coo(
        [0, 1, 1], [0, 0, 1], [1.0, 0.25, 0.25], teacher_size=4, student_size=4
    )
    plain = verbalizer.coverage()
    assert plain == (1.5 / 4, 0.5, 0.5, {})
    frequency = torch.tensor([1, 2, 0, 1])
    tokens = [b"water", "\u0e34".encode(), None, b"\xe0\xb8"]
    found = verbalizer.coverage(frequency, tokens)
    assert found.mass == (1 + 2 * 0.5) / 4
    assert found.by_script == {"LATIN": 1.0, "THAI": 0.5, "bytes": 0.0}
    with pytest.raises(ValueError, match=r"frequency must have shape \(4,\), got \(2,\)"):
        verbalizer.coverage(torch.ones(2))
    with pytest.raises(ValueError, match="got 0 throughout"):
        verbalizer.coverage(torch.zeros(4))
    with pytest.raises(ValueError, match="frequency must be finite and not negative, got nan at 1"):
        verbalizer.coverage(torch.tensor([1, torch.nan, 0, 0]))
    with pytest.raises(ValueError, match="tokens must be at most 4, got 5"):
        verbalizer.coverage(tokens=[b"a"] * 5)


@pytest.mark.parametrize(
    ("teacher_name", "student_name"), [("qwen", "tekken"), ("qwen3_6", "demo")]
)
def test_whole_vocabularies_in_a_minute(teacher_name, student_name):
    makers = INSTALLED | BUILT
    teacher, student = makers[teacher_name](), makers[student_name]()
    begin = time.perf_counter()
    verbalizer = Verbalizer.from_tokenizers(teacher, student)
    assert time.perf_counter() - begin < MINUTE
    tokens, own = token_bytes(teacher), token_bytes(student)
    spoken = torch.tensor([token is not None for token in tokens])
    assert bool((verbalizer.mapped[spoken] == 1).all())
    for i, k in zip(verbalizer.teacher_ids.tolist(), verbalizer.entry_class.tolist(), strict=True):
        assert (tokens[i] or b"").startswith(own[k] or b"")
    assert verbalizer.mapped[teacher.eos_token_id] == 1
