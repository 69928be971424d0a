"""Loading, preparing and collating data; the embedded demo data and its tokenizer."""

from __future__ import annotations

import copy
import filecmp
import gzip
import json
import re
from collections import Counter
from typing import Any, cast

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import AutoTokenizer

from dudi import demo_data
from dudi.data import DuDiCollator, load_data, prepare_dataset
from dudi.verbalize import ContextVerbalizer

ROW = {"prompt": "Say hi", "completion": "hi there"}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "second"},
]
ANSWER = {"role": "assistant", "content": "final"}


@pytest.fixture(scope="module")
def original():
    return AutoTokenizer.from_pretrained(demo_data.data_path("tokenizer"))


@pytest.fixture
def tokenizer(original):
    return copy.deepcopy(original)


def prepare(rows, tokenizer, **options):
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **options)


def prepare_one(row, tokenizer, **options):
    return prepare([row], tokenizer, **options)[0][0]


# ---- the demo's data ---------------------------------------------------------------------------


def test_splits_are_by_key_and_share_no_english_text():
    items = demo_data.ui_strings()
    splits = {item["key"]: demo_data.split_of(item["key"]) for item in items}
    assert len(splits) == len(items) == 951
    sizes = Counter(splits.values())
    assert sizes == {"train": 770, "validation": 53, "test": 128}
    texts = [(splits[item["key"]], demo_data.words(item["en"])) for item in items]
    for i, (split, words) in enumerate(texts):
        for other, theirs in texts[:i]:
            if split != other:
                assert demo_data.similarity(words, theirs) < demo_data.SAME_TEXT


def test_translation_rows():
    rows = {split: demo_data.translation_rows(split) for split in demo_data.SPLITS}
    keys = {split: {row["key"] for row in made} for split, made in rows.items()}
    assert sum(map(len, keys.values())) == 951 == len(set().union(*keys.values()))
    items = {item["key"]: item for item in demo_data.ui_strings()}
    assert len({(row["source"], row["language"]) for row in rows["test"]}) == 18
    for row in rows["test"]:
        item = items[row["key"]]
        (prompt,), (completion,) = row["prompt"], row["completion"]
        instruction = demo_data.instruction(row["source"], row["language"])
        assert prompt == {"role": "user", "content": instruction + item[row["source"]]}
        assert completion == {"role": "assistant", "content": item[row["language"]]}
        pivots = {code for code in demo_data.LANGUAGES if item[code] == row["pivot_prompt"]}
        assert pivots - {row["source"], row["language"]}
        assert item[row["source"]] != item[row["language"]]
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        demo_data.translation_rows("dev")


def test_tokenizer_is_what_train_tokenizer_makes(tmp_path, original):
    demo_data.train_tokenizer(tmp_path)
    embedded = demo_data.data_path("tokenizer")
    assert filecmp.cmp(tmp_path / "tokenizer.json", embedded / "tokenizer.json", shallow=False)
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert made.get_vocab() == original.get_vocab() and len(made) == demo_data.VOCAB_SIZE
    assert made.chat_template == original.chat_template
    assert made.special_tokens_map == original.special_tokens_map


def test_tokenizer_round_trips_every_text(original):
    texts = [item[code] for item in demo_data.ui_strings() for code in ("en", *demo_data.LANGUAGES)]
    texts += ["", "a  b\n\n c ", "don 't , . !", r"\boxed{1}", "២៣ ๑๒ 🙂\u200b", "e\u0301"]
    assert [original.decode(ids) for ids in original(texts)["input_ids"]] == texts
    assert original.pad_token_id != original.eos_token_id
    assert original.bos_token_id is None


def test_demo_prepares_with_and_without_the_verbalizer(tokenizer):
    rows = demo_data.translation_rows("validation")
    prepared, counts = prepare(rows, tokenizer, verbalizer=ContextVerbalizer())
    plain, _ = prepare(rows, tokenizer)
    assert counts["rows"] == len(prepared) == len(rows) and counts["dropped"] == 0
    for row, made, bare in zip(rows, prepared, plain, strict=True):
        prompt, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        assert tokenizer.decode(made["prompt_ids"]) == f"<|user|>{prompt}<|end|><|assistant|>"
        assert tokenizer.decode(made["completion_ids"]) == f"{answer}<|end|>"
        assert (made["prompt_text"], made["completion_text"]) == (prompt, answer)
        seen = tokenizer.decode(made["teacher_prompt_ids"])
        assert seen.startswith(f"<|user|>{prompt}\n") and row["pivot_prompt"] in seen
        assert seen.endswith("<|end|><|assistant|>")
        assert made["language"] == row["language"]
        assert bare["teacher_prompt_ids"] == bare["prompt_ids"] == made["prompt_ids"]
        assert bare["completion_ids"] == made["completion_ids"]


# ---- formats -----------------------------------------------------------------------------------


def test_formats_agree(tokenizer):
    expected = prepare_one({"prompt": TURNS, "completion": [ANSWER]}, tokenizer)
    assert prepare_one({"messages": [*TURNS, ANSWER]}, tokenizer) == expected
    assert tokenizer.decode(expected["prompt_ids"]) == (
        "<|system|>Be kind.<|end|><|user|>first<|end|><|assistant|>answer<|end|>"
        "<|user|>second<|end|><|assistant|>"
    )
    assert expected["prompt_text"] == "second" and expected["language"] == ""
    text = {
        "prompt": tokenizer.decode(expected["prompt_ids"]),
        "completion": "final",
        "more": 1,
    }
    standard = prepare_one(text, tokenizer)
    for name in ("prompt_ids", "completion_ids", "teacher_prompt_ids", "row"):
        assert standard[name] == expected[name]


def test_verbalized_text_replaces_the_last_user_turn(tokenizer):
    verbalizer = ContextVerbalizer({"en": r"{{ prompt }} + {{ pivot_prompt }} -> \boxed{}"})
    row = {"prompt": TURNS, "completion": [ANSWER], "language": "en-GB"}
    row["pivot_prompt"] = [{"role": "user", "content": "kedua"}]
    made = prepare_one(row, tokenizer, verbalizer=verbalizer)
    seen = tokenizer.decode(made["teacher_prompt_ids"])
    assert seen == tokenizer.decode(made["prompt_ids"]).replace(
        "second", r"second + kedua -> \boxed{}"
    )


def test_teacher_without_a_chat_template_reads_plain_text(tokenizer):
    teacher = copy.deepcopy(tokenizer)
    teacher.chat_template = None
    verbalizer = ContextVerbalizer({"en": "{{ prompt }}!"})
    row = {"prompt": TURNS, "completion": [ANSWER], "language": "en"}
    made = prepare_one(row, tokenizer, teacher_tokenizer=teacher, verbalizer=verbalizer)
    seen = tokenizer.decode(made["teacher_prompt_ids"])
    assert seen == "Be kind.\n\nfirst\n\nanswer\n\nsecond!"


def test_standard_text_keeps_bos_and_never_ends_a_prompt_with_eos(tokenizer):
    bos, eos = "<|system|>", tokenizer.eos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)],
    )
    assert tokenizer.decode(tokenizer("x")["input_ids"]) == f"{bos}x{eos}"
    made = prepare_one(ROW, tokenizer)
    assert tokenizer.decode(made["prompt_ids"]) == f"{bos}Say hi"
    assert tokenizer.decode(made["completion_ids"]) == f"hi there{eos}"
    assert prepare_one({**ROW, "prompt": ""}, tokenizer)["prompt_ids"] == [
        tokenizer.convert_tokens_to_ids(bos)
    ]


@pytest.mark.parametrize("ending", ["<|end|>", "<|end|>\\n", "<|end|>\\n<|end|>", "", "\\n"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_eos_comes_once_and_last(tokenizer, ending, pad_is_eos):
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", ending)
    made = prepare_one({"prompt": TURNS, "completion": [ANSWER]}, tokenizer)
    eos = tokenizer.eos_token_id
    assert made["completion_ids"][-1] == eos and made["completion_ids"].count(eos) == 1
    assert tokenizer.decode(made["completion_ids"]).startswith("final")
    plain = prepare_one({"prompt": "p", "completion": "hi<|end|>"}, tokenizer)
    assert tokenizer.decode(plain["completion_ids"]) == "hi<|end|>"


# ---- limits ------------------------------------------------------------------------------------

LIMITED = [
    {"prompt": "1234", "completion": "12"},
    {"prompt": "123456", "completion": "12"},
    {"prompt": "12", "completion": "1234"},  # with EOS one over the limit
    {"prompt": "123456", "completion": "123456"},
    {"prompt": "1", "completion": "123"},  # with EOS exactly at the limit
]


def test_truncation_takes_the_middle_of_prompts_and_the_end_of_completions(tokenizer):
    made, counts = prepare(LIMITED, tokenizer, max_prompt_length=4, max_completion_length=4)
    assert counts == {
        "rows": 5,
        "truncated_prompts": 2,
        "truncated_completions": 2,
        "truncated_teacher_prompts": 0,
        "unpaired_responses": 0,
        "dropped": 0,
        "bad_rows": 0,
    }
    assert [tokenizer.decode(ids) for ids in made["prompt_ids"]] == [
        "1234", "1256", "12", "1256", "1",
    ]  # fmt: skip
    assert [tokenizer.decode(ids) for ids in made["completion_ids"]] == [
        "12<|end|>", "12<|end|>", "1234", "1234", "123<|end|>",
    ]  # fmt: skip
    assert made["completion_text"][3] == "123456"


def test_dropping_keeps_the_row_numbers(tokenizer):
    made, counts = prepare(
        LIMITED, tokenizer, max_prompt_length=4, max_completion_length=4, overlong="drop"
    )
    assert made["row"][:] == [0, 4]
    assert counts["dropped"] == 3 and counts["rows"] == 2
    assert counts["truncated_prompts"] == counts["truncated_completions"] == 0
    with pytest.raises(ValueError, match="no row of the train dataset is left: all 5 exceed"):
        prepare(LIMITED, tokenizer, max_completion_length=1, overlong="drop")


def test_verbalized_prompts_have_a_limit_of_their_own(tokenizer):
    tokenizer.chat_template = None
    verbalizer = ContextVerbalizer({"en": "{{ prompt }}{{ prompt }}"})
    rows = [{**row, "language": "en"} for row in LIMITED]
    options = {"verbalizer": verbalizer, "max_prompt_length": 4}
    made, counts = prepare(rows, tokenizer, **options)
    assert tokenizer.decode(made["teacher_prompt_ids"][1]) == "123456123456"
    assert counts["truncated_teacher_prompts"] == 0 and counts["truncated_prompts"] == 2
    made, counts = prepare(rows, tokenizer, **options, max_teacher_prompt_length=7)
    assert tokenizer.decode(made["teacher_prompt_ids"][1]) == "1233456"
    assert counts["truncated_teacher_prompts"] == 3
    _, counts = prepare(rows, tokenizer, **options, max_teacher_prompt_length=7, overlong="drop")
    assert counts["rows"] == 2


def test_truncation_never_takes_the_generation_prompt(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|assistant|>' -}}", "'<|assistant|>' + '1234' -}}"
    ).replace(
        "message['content']",
        "('1234' if message['role'] == 'assistant' else '') + message['content']",
    )
    row = {"prompt": [{"role": "user", "content": "567890"}], "completion": [ANSWER]}
    for limit in range(6, 13):
        made = prepare_one(row, tokenizer, max_prompt_length=limit)
        text = tokenizer.decode(made["prompt_ids"])
        assert len(made["prompt_ids"]) == limit and text.endswith("<|assistant|>1234")
        assert text.startswith("<|user|>")
    with pytest.raises(ValueError, match=r"row 0 .*limit of 5 tokens.*begins the answer with 5"):
        prepare_one(row, tokenizer, max_prompt_length=5)


def test_processes_and_saved_datasets_leave_nothing_beside_the_data(tokenizer, tmp_path):
    rows = [{**row, "language": "th"} for row in LIMITED * 2]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    options: dict[str, Any] = {"verbalizer": ContextVerbalizer(), "split_name": "eval"}
    alone, counts = prepare_dataset(load_data(tmp_path / "saved"), tokenizer, **options)
    pair = prepare_dataset(load_data(tmp_path / "saved"), tokenizer, num_proc=2, **options)
    assert pair[0][:] == alone[:] and pair[1] == counts
    assert sorted(tmp_path.rglob("*")) == before


# ---- what is refused ---------------------------------------------------------------------------

MESSAGES = {"prompt": TURNS, "completion": [ANSWER]}
BAD_ROWS = {
    "empty completion": ({**ROW, "completion": " \n"}, "completion must not be empty"),
    "no completion": ({**ROW, "completion": None}, "completion must be text.*nothing"),
    "prompt type": ({"prompt": 3, "completion": "x"}, "prompt must be text or .*got int"),
    "completion type": ({**ROW, "completion": [ANSWER]}, "completion must be text.*got list"),
    "mixed": ({**MESSAGES, "completion": "x"}, "completion must be a list of messages, got str"),
    "empty prompt": ({**ROW, "prompt": ""}, "prompt must give at least one token"),
    "eos inside": ({**ROW, "completion": "a<|end|>b<|end|>"}, "must not hold the end-of-seq"),
    "no role": ({**MESSAGES, "prompt": [{"content": "x"}]}, "messages with a role"),
    "no messages": ({"messages": []}, "at least one message"),
    "one message": ({"messages": [ANSWER]}, "must hold a prompt before"),
    "user last": ({"messages": TURNS}, "must have the role 'assistant', got 'user'"),
    "two answers": ({**MESSAGES, "completion": [*TURNS, ANSWER]}, "one message, got 5"),
    "answer before": ({"messages": [ANSWER, ANSWER]}, "must not have the role 'assistant'"),
    "language type": ({**ROW, "language": 3}, "language must be text, got int"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(tokenizer, case):
    bad: Any
    bad, message = BAD_ROWS[case]
    good: Any = {k: v for k, v in {**ROW, "messages": [*TURNS, ANSWER]}.items() if k in bad}
    if isinstance(bad.get("prompt"), list):
        good = MESSAGES
    good = {**good, **({"language": "th"} if "language" in bad else {})}
    rows = [good, bad] if _arrow_accepts([good, bad]) else [bad]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        prepare(rows, tokenizer, split_name="eval")
    assert f"row {len(rows) - 1} of the eval dataset: " in str(caught.value)
    if len(rows) == 2:
        aside: list[dict[str, Any]] = []
        with pytest.warns(UserWarning, match="1 of 2 rows of the eval dataset are bad .*row 1"):
            made, counts = prepare(rows, tokenizer, split_name="eval", quarantine=aside)
        assert made["row"][:] == [0] and (counts["bad_rows"], counts["dropped"]) == (1, 0)
        assert made[:] == prepare([good], tokenizer)[0][:]
        (told,) = aside
        assert (told["split"], told["row"]) == ("eval", 1) and re.search(message, told["reason"])


def test_nothing_but_bad_rows_is_an_error(tokenizer):
    with (
        pytest.warns(UserWarning, match="bad and left out"),
        pytest.raises(ValueError, match="no row of the train dataset is left: 2 are bad, 0 exceed"),
    ):
        prepare([{**ROW, "completion": ""}] * 2, tokenizer, quarantine=[])


def test_a_row_without_a_language_is_set_aside(tokenizer):
    rows = [{**ROW, "language": code} for code in ("th", None)]
    aside: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match="row 1 is the first: language must"):
        made, _ = prepare(rows, tokenizer, verbalizer=ContextVerbalizer(), quarantine=aside)
    assert made["row"][:] == [0]


def _arrow_accepts(rows):
    """A column has one type, so a row of the wrong type is seldom alone."""
    try:
        return Dataset.from_list(rows)[:] is not None
    except Exception:
        return False


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "answer": "b"}], "missing: completion, language; it has answer, prompt"),
        ([{"text": "a"}], "missing: prompt, completion, language; it has text"),
        ([ROW], "missing: language; it has completion, prompt"),
        ([], "empty dataset"),
        ([{**ROW, "language": "th"}, {**ROW, "language": None}], "row 1 of .* got None"),
        ([{**ROW, "language": "th"}, {**ROW, "language": "xx"}], "got 'xx'; there are .* en, fil"),
        ([{**ROW, "language": "en"}], "row 0 .*prints 'pivot_prompt'"),
        (
            [{**ROW, "language": "th", "pivot_prompt": 3}],
            "row 0 .*pivot_prompt must be text or a list of messages, got int",
        ),
        (
            [{"messages": [TURNS[0], ANSWER], "language": "th"}],
            "row 0 .*must hold a user turn for the verbalizer",
        ),
    ],
)
def test_bad_datasets_are_refused_with_the_verbalizer_on(tokenizer, rows, message):
    verbalizer = ContextVerbalizer({"en": "{{ pivot_prompt }}"})
    with pytest.raises((TypeError, ValueError), match=message):
        prepare(rows, tokenizer, verbalizer=verbalizer)


def test_a_token_across_the_border_of_the_prompt_is_split(tokenizer):
    """Thinking templates: the prompt ends in one newline where the whole has two, one token."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}.\n\n--\n{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>.\n{% endif %}"
    )
    row = {"prompt": TURNS[1:2], "completion": [ANSWER]}
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    made = prepare_one(row, tokenizer)
    assert tokenizer.decode(made["prompt_ids"]) == "<|user|>first<|end|><|assistant|>.\n"
    assert tokenizer.decode(made["completion_ids"]) == "\n--\nfinal<|end|>"


def test_switches_of_the_chat_template_are_set_for_both_sides(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and quick %}--{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if quick %}--{% endif %}{% endif %}"
    )
    row = {"prompt": TURNS[1:2], "completion": [ANSWER], "language": "en"}
    options = {"verbalizer": ContextVerbalizer({"en": "{{ prompt }}!"})}
    made = prepare_one(row, tokenizer, **options, chat_template_kwargs={"quick": True})
    assert tokenizer.decode(made["prompt_ids"]) == "<|user|>first<|end|><|assistant|>--"
    assert tokenizer.decode(made["teacher_prompt_ids"]) == "<|user|>first!<|end|><|assistant|>--"
    assert tokenizer.decode(made["completion_ids"]) == "final<|end|>"
    assert "--" not in tokenizer.decode(prepare_one(row, tokenizer, **options)["prompt_ids"])


def test_bos_comes_once(tokenizer):
    bos = "<|system|>"
    tokenizer.bos_token = bos
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    made = prepare_one({**ROW, "prompt": f"{bos}Say hi"}, tokenizer)
    assert tokenizer.decode(made["prompt_ids"]) == f"{bos}Say hi"


def test_chat_templates_that_cannot_be_honoured(tokenizer):
    row = {"prompt": TURNS, "completion": [ANSWER]}
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("message['content']", "message['content'][:3]")
    with pytest.raises(ValueError, match=r"row 0 .*loses the response.*'final'"):
        prepare([row], tokenizer)
    again = {"prompt": TURNS[1:2], "completion": [{**ANSWER, "content": "first"}]}  # as the prompt
    drop = "(message['content'] if message['role'] != 'assistant' else '')"
    tokenizer.chat_template = template.replace("message['content']", drop)
    with pytest.raises(ValueError, match=r"row 0 .*loses the response.*'first'"):
        prepare([again], tokenizer)
    tokenizer.chat_template = template.replace("'<|assistant|>'", "'<|assistant|>THINK'")
    with pytest.raises(ValueError, match=r"row 0 .*THINK.*Set a chat template without"):
        prepare([row], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"row 0 .*chat template refuses the row: no system role"):
        prepare([row], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"row 0 .*must have a chat template"):
        prepare([row], tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1 or None, got 0"),
        ({"overlong": "cut"}, "overlong must be 'truncate' or 'drop', got 'cut'"),
    ],
)
def test_bad_options(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        prepare([ROW], tokenizer, **options)


def test_wrong_arguments(tokenizer):
    with pytest.raises(TypeError, match="one split, got a DatasetDict: pass one of test"):
        prepare_dataset(DatasetDict({"test": Dataset.from_list([ROW])}), tokenizer)
    with pytest.raises(TypeError, match=r"must be a datasets.Dataset, got list"):
        prepare_dataset([ROW], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-sequence token"):
        prepare([ROW], tokenizer)
    with pytest.raises(TypeError, match="pad_token_id must be an int, got None"):
        DuDiCollator(cast(Any, None))


# ---- batches -----------------------------------------------------------------------------------


def test_collator_pads_prompts_left_and_completions_right():
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 1], "teacher_prompt_ids": [8], "row": 3},
        {"prompt_ids": [5], "completion_ids": [1], "teacher_prompt_ids": [8, 9, 9], "row": 0},
    ]
    rows = [row | {"plain_prompt_ids": row["prompt_ids"]} for row in rows]
    batch = DuDiCollator(1)(rows)  # pad is EOS here
    expected = {
        "prompt_ids": [[5, 6], [1, 5]],
        "prompt_mask": [[1, 1], [0, 1]],
        "teacher_prompt_ids": [[1, 1, 8], [8, 9, 9]],
        "teacher_prompt_mask": [[0, 0, 1], [1, 1, 1]],
        "plain_prompt_ids": [[5, 6], [1, 5]],
        "plain_prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[7, 1], [1, 1]],
        "completion_mask": [[1, 1], [1, 0]],
        "row": [3, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


# ---- loading -----------------------------------------------------------------------------------

LINE = json.dumps(ROW) + "\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets.config

    cache = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def test_every_kind_of_file_loads(tmp_path):
    data = Dataset.from_list([ROW, ROW])
    (tmp_path / "a.jsonl").write_text(LINE + "\n" + LINE)
    (tmp_path / "a.json").write_text(json.dumps([ROW, ROW]))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(LINE * 2)
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "Say hi,hi there\n" * 2)
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\n" + "Say hi\thi there\n" * 2)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "saved-splits")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(LINE * 2)
    for path in tmp_path.iterdir():
        assert load_data(path)[:] == data[:], path.name
    assert load_data(str(tmp_path / "a.jsonl"), split="train[:1]")[:] == data[:1]


def test_csv_values_are_text(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion,x\n007,NA,\n"a\nb",None,1\n')
    loaded = load_data(tmp_path / "a.csv")
    assert loaded["prompt"][:] == ["007", "a\nb"] and loaded["completion"][:] == ["NA", "None"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            LINE * 2 + '{"prompt": "a", oops}\n',
            r"a\.jsonl, line 3, column 17: malformed",
        ),
        ("a.jsonl", LINE + "3\n", r"a\.jsonl, line 2: must be a JSON object, got int"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a\.json, line 2, column 7: malformed JSON"),
        ("a.jsonl", LINE + '{"prompt": "\udcff"}\n', r"line 2: must be UTF-8"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "x", r"must end in one of \.jsonl, .*got .*a\.txt"),
        ("a.parquet", "x", r"a\.parquet' can't be read"),
        ("a.jsonl.gz", "x", r"a\.jsonl\.gz' can't be read"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / name)


def test_wrong_type_in_one_line_is_named_with_its_row(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(LINE + '{"prompt": 3, "completion": "x"}\n')
    with pytest.raises(
        TypeError, match=r"row 1 of the train dataset: prompt must be text.*got int"
    ):
        prepare_dataset(load_data(tmp_path / "a.jsonl"), tokenizer)


def test_missing_files_folders_and_splits(tmp_path, monkeypatch):
    for name in (tmp_path / "none.jsonl", "none.csv", "./none", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"none.* does not exist"):
            load_data(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a dataset"):
        load_data(tmp_path / "empty")
    (tmp_path / "a.jsonl").write_text(LINE)
    with pytest.raises(ValueError, match=r"a\.jsonl.*split 'test'"):
        load_data(tmp_path / "a.jsonl", split="test")
    DatasetDict({"dev": Dataset.from_list([ROW])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"split must be one of dev in .*, got 'train'"):
        load_data(tmp_path / "saved")

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("dudi.data.load_dataset", offline)
    with pytest.raises(ValueError, match=r"'someone/something' is neither .*no network"):
        load_data("someone/something")
