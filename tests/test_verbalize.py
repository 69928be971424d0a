"""The context verbalizer: every default renders, data stays data, mistakes are named."""

from __future__ import annotations

import itertools
import pickle

import pytest

from dudi.verbalize import CONTEXT_FIELDS, DEFAULT_TEMPLATES, LANGUAGE_NAMES, ContextVerbalizer

LANGUAGES = ("id", "ms", "vi", "th", "fil", "my", "km", "lo", "ta", "jv", "su", "en")
HOSTILE = r"\boxed{2} {{ prompt }} {% if %} {# no #} 100% {0} $x <b>&amp;"


def test_defaults_cover_the_languages():
    assert set(DEFAULT_TEMPLATES) == set(LANGUAGES) == set(LANGUAGE_NAMES)
    last_lines = {template.splitlines()[-1] for template in DEFAULT_TEMPLATES.values()}
    assert len(last_lines) == len(LANGUAGES)  # each asks for its own language


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_default_renders_every_combination_of_fields(language):
    verbalizer = ContextVerbalizer()
    rendered = set()
    for present in itertools.product((False, True), repeat=len(CONTEXT_FIELDS)):
        context = {
            field: f"{field}: {HOSTILE}" if there else None
            for field, there in zip(CONTEXT_FIELDS, present, strict=True)
        }
        row = {"prompt": f"question {HOSTILE}", "completion": "SECRET", **context}
        text = verbalizer.render(row, language)
        lines = text.splitlines()
        assert lines[0] == row["prompt"]
        assert len(lines) == 2 + sum(present) and all(line.strip() for line in lines)
        for field, there in zip(CONTEXT_FIELDS, present, strict=True):
            assert (f"{field}: {HOSTILE}" in text) == there
        assert "SECRET" not in text and "None" not in text
        assert text == verbalizer.render({k: v for k, v in row.items() if v}, language)
        assert text == verbalizer.render({k: v or "" for k, v in row.items()}, language)
        rendered.add(text)
    assert len(rendered) == 2 ** len(CONTEXT_FIELDS)


@pytest.mark.parametrize(
    ("language", "code"),
    [("tl", "fil"), ("id-ID", "id"), ("TH", "th"), ("my_MM", "my"), ("tl-PH", "fil"), ("in", "id")],
)
def test_aliases_and_regions(language, code):
    verbalizer = ContextVerbalizer()
    assert verbalizer.resolve(language) == code
    row = {"prompt": "p"}
    assert verbalizer.render(row, language) == verbalizer.render(row, code)


def test_overrides_see_all_fields_and_survive_pickling():
    source = (
        "{{ language }}/{{ language_name }}: {{ prompt }} ({{ topic }})"
        "{% if pivot_prompt is none %} alone{% endif %}\n"
    )
    verbalizer = ContextVerbalizer(
        {"th": source, "zh-Hant": "傳統 {{ prompt }}", "zh": "{{ prompt }}"}
    )
    row = {"prompt": HOSTILE, "topic": "maths"}
    expected = f"th-TH/Thai: {HOSTILE} (maths) alone"
    assert verbalizer.render(row, "th-TH") == expected
    assert verbalizer.render({"prompt": "x"}, "zh-Hant-TW") == "傳統 x"
    assert verbalizer.render({"prompt": "x"}, "zh-CN") == "x"
    assert "en" in verbalizer.languages and "zh" in verbalizer.languages
    assert pickle.loads(pickle.dumps(verbalizer)).render(row, "th-TH") == expected


def test_syntax_error_names_language_and_line():
    with pytest.raises(ValueError, match=r"language 'th' is not valid jinja2: line 2"):
        ContextVerbalizer({"th": "{{ prompt }}\n{% if pivot_prompt %}oops"})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ promt }}", "'promt' is undefined"),
        ("{{ pivot_prompt }}", "prints 'pivot_prompt', which the row does not have"),
        (
            "{% if pivot_completion %}{{ pivot_completion }}{% endif %}{{ privileged_context }}",
            "prints 'privileged_context', which",
        ),
        ("{{ prompt / 2 }}", "failed: TypeError"),
        ("{{ prompt.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ prompt | upper }}{{ ''.join(fields) }}", "'fields' is undefined"),
    ],
)
def test_failing_render_names_what_failed(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        ContextVerbalizer({"lo": template}).render({"prompt": "p"}, "lo")
    assert "'lo'" in str(caught.value)


@pytest.mark.parametrize("language", ["xx", "", None, 3])
def test_unknown_language_is_named_with_those_known(language):
    with pytest.raises(ValueError, match=r"got .*en, fil, id, jv, km") as caught:
        ContextVerbalizer().render({"prompt": "p"}, language)
    assert repr(language) in str(caught.value)


@pytest.mark.parametrize("templates", ["th", {"th": 3}, {3: "th"}])
def test_templates_of_the_wrong_type(templates):
    with pytest.raises(TypeError, match="templates must map language codes"):
        ContextVerbalizer(templates)
