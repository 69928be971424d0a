"""The context verbalizer: what the teacher reads in place of the student's prompt.

The teacher scores the student's response tokens, but under a prompt that the student does not see:
the same item in a pivot language, its reference answer, other privileged context, and an
instruction in the target language. One jinja2 template per language says how a row becomes that
prompt; a chain makes several turns of it. Values are data: they are never parsed as templates, so
`\\boxed{}` and `{{` come out as they went in. Templates run sandboxed, since they may come from
somebody else's config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

FIELDS = (
    "prompt", "completion", "pivot_prompt", "pivot_completion", "privileged_context",
    "student_completion",
)  # fmt: skip
ROLES = ("system", "user", "assistant")
DEFAULT_CHAIN = ({"user": "{{ template }}"},)
Message = dict[str, str]  # role and content
CONTEXT_FIELDS = ("pivot_prompt", "pivot_completion", "privileged_context")
LANGUAGE_NAMES = {
    "en": "English",
    "id": "Indonesian",
    "ms": "Malay",
    "vi": "Vietnamese",
    "th": "Thai",
    "fil": "Filipino",
    "my": "Burmese",
    "km": "Khmer",
    "lo": "Lao",
    "ta": "Tamil",
    "jv": "Javanese",
    "su": "Sundanese",
}
ALIASES = {"tl": "fil", "in": "id", "jw": "jv"}  # older and narrower codes of the same languages


def _template(pivot: str, answer: str, context: str, instruction: str) -> str:
    return (
        "{{ prompt }}\n"
        f"{{% if pivot_prompt %}}\n{pivot} {{{{ pivot_prompt }}}}\n{{% endif %}}\n"
        f"{{% if pivot_completion %}}\n{answer} {{{{ pivot_completion }}}}\n{{% endif %}}\n"
        f"{{% if privileged_context %}}\n{context} {{{{ privileged_context }}}}\n{{% endif %}}\n"
        f"{instruction}"
    )


# "The same text in another language", "reference answer", "context", "answer in this language".
DEFAULT_TEMPLATES: dict[str, str] = {
    "en": _template(
        "The same text in another language:",
        "Reference answer:",
        "Context:",
        "Answer in English.",
    ),
    "id": _template(
        "Teks yang sama dalam bahasa lain:",
        "Jawaban acuan:",
        "Konteks:",
        "Jawab dalam bahasa Indonesia.",
    ),
    "ms": _template(
        "Teks yang sama dalam bahasa lain:",
        "Jawapan rujukan:",
        "Konteks:",
        "Jawab dalam bahasa Melayu.",
    ),
    "vi": _template(
        "Văn bản này bằng ngôn ngữ khác:",
        "Đáp án tham khảo:",
        "Ngữ cảnh:",
        "Hãy trả lời bằng tiếng Việt.",
    ),
    "th": _template(
        "ข้อความเดียวกันในภาษาอื่น:",
        "คำตอบอ้างอิง:",
        "บริบท:",
        "ตอบเป็นภาษาไทย",
    ),
    "fil": _template(
        "Ang parehong teksto sa ibang wika:",
        "Sangguniang sagot:",
        "Konteksto:",
        "Sumagot sa wikang Filipino.",
    ),
    "my": _template(
        "အခြားဘာသာစကားဖြင့် တူညီသောစာ:",
        "ကိုးကားရန် အဖြေ:",
        "နောက်ခံအချက်အလက်:",
        "မြန်မာဘာသာဖြင့် ဖြေပါ။",
    ),
    "km": _template(
        "អត្ថបទដដែលជាភាសាផ្សេង៖",
        "ចម្លើយយោង៖",
        "បរិបទ៖",
        "សូមឆ្លើយជាភាសាខ្មែរ។",
    ),
    "lo": _template(
        "ຂໍ້ຄວາມດຽວກັນໃນພາສາອື່ນ:",
        "ຄຳຕອບອ້າງອີງ:",
        "ບໍລິບົດ:",
        "ຕອບເປັນພາສາລາວ.",
    ),
    "ta": _template(
        "இதே உரை வேறு மொழியில்:",
        "மாதிரி விடை:",
        "சூழல்:",
        "தமிழில் பதிலளிக்கவும்.",
    ),
    "jv": _template(
        "Teks sing padha ing basa liya:",
        "Wangsulan rujukan:",
        "Konteks:",
        "Wangsulana nganggo basa Jawa.",
    ),
    "su": _template(
        "Téks nu sarua dina basa séjén:",
        "Jawaban rujukan:",
        "Kontéks:",
        "Jawab dina basa Sunda.",
    ),
}


class _AbsentField(Exception):
    """A template printed a field that the row lacks: better an error than the word None."""


def _refuse_none(value: Any) -> Any:
    if value is None:
        raise _AbsentField
    return value


def _environment() -> jinja2.Environment:
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=_refuse_none,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


class ContextVerbalizer:
    """Renders what the teacher reads for a row. Replaces, for each row and by hand,

        text = prompt + "\\n" + label_in(language) + pivot_prompt + "\\n" + answer_in(language)

    Templates see `prompt` and `completion` (text), `language`, `language_name` (in English),
    `pivot_prompt`, `pivot_completion`, `privileged_context`, `student_completion` (what the student
    wrote for this prompt in this step) and every other column of the row by its name. What the row
    lacks is None, so that `{% if pivot_prompt %}` works.

    Args:
        templates: overrides and additions to `DEFAULT_TEMPLATES`, by language code.
        chain: the turns that stand in place of the last user turn, each {role: template}, with
            `template` for the text of the language's template. By default it is one turn::

                [{"user": "{{ template }}"}]

            A pivot question and its answer as a turn of their own, then the language's template::

                [
                    {"user": "{{ pivot_prompt or '' }}"},
                    {"assistant": "{{ pivot_completion or '' }}"},
                    {"user": "{{ template }}"},
                ]

            A turn that comes out empty is left out. The last one must be the user's.

    Raises:
        ValueError: a template that is not valid jinja2, with its place and line; a chain that does
            not end with the user's turn.
    """

    def __init__(
        self,
        templates: Mapping[str, str] | None = None,
        chain: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        if templates is not None and not isinstance(templates, Mapping):
            raise TypeError(
                "templates must map language codes to jinja2 templates, "
                f"got {type(templates).__name__}"
            )
        self.templates = dict(DEFAULT_TEMPLATES)
        for language, source in (templates or {}).items():
            if not isinstance(language, str) or not isinstance(source, str):
                raise TypeError(
                    "templates must map language codes (str) to jinja2 templates (str), "
                    f"got {language!r}: {type(source).__name__}"
                )
            if not language.strip() or not source.strip():
                raise ValueError(
                    "templates must map language codes to templates, neither of them empty, "
                    f"got {language!r}: {source!r}"
                )
            self.templates[normalise(language)] = source
        self.chain = _checked_chain(DEFAULT_CHAIN if chain is None else chain)
        self._compile()

    def _compile(self) -> None:
        self._compiled = {
            language: _compiled(f"template for language {language!r}", source)
            for language, source in self.templates.items()
        }
        self._turns = [
            (role, _compiled(f"chain, turn {i + 1},", source))
            for i, (role, source) in enumerate(self.chain)
        ]

    def __getstate__(self) -> tuple[dict[str, str], list[tuple[str, str]]]:
        # compiled templates neither pickle nor hash: workers and fingerprints get the sources
        return self.templates, self.chain

    def __setstate__(self, state: tuple[dict[str, str], list[tuple[str, str]]]) -> None:
        self.templates, self.chain = state
        self._compile()

    @property
    def reads_samples(self) -> bool:
        """Whether any template names `student_completion`, which is there once y- is drawn."""
        return self.reads("student_completion")

    def reads(self, field: str) -> bool:
        """Whether any template names `field`."""
        sources = [*self.templates.values(), *(source for _, source in self.chain)]
        return any(field in _names(source) for source in sources)

    @property
    def languages(self) -> list[str]:
        """Codes that have a template."""
        return sorted(self.templates)

    def resolve(self, language: str) -> str:
        """The code whose template serves `language`: itself, its alias, or without its subtags.

        Raises ValueError that names the language and lists those that have a template.
        """
        code = language if isinstance(language, str) else ""
        found = next((code for code in codes(code) if code in self.templates), None)
        if found is not None:
            return found
        raise ValueError(
            f"language must have a verbalizer template, got {language!r}; there are templates for "
            f"{', '.join(self.languages)}; add one as verbalizer_templates: {{{language}: ...}}"
        )

    def render(self, row: Mapping[str, Any], language: str) -> str:
        """The language's template for `row`, as text.

        `prompt` and `completion` in the row are texts (of a conversation: its last user turn).
        Raises ValueError for a language without a template, and for a template that fails: the
        message names the field; `data.prepare_dataset` adds the row.
        """
        code = self.resolve(language)
        return _rendered(
            f"template for language {code!r}", self._compiled[code], _fields(row, language, code)
        )

    def messages(self, row: Mapping[str, Any], language: str) -> list[Message]:
        """The turns of the chain for `row`, each {"role": ..., "content": ...}.

        Raises ValueError as `render` does, and where the last turn comes out empty.
        """
        text = self.render(row, language)
        fields = {**_fields(row, language, self.resolve(language)), "template": text}
        turns = [
            {"role": role, "content": _rendered(f"chain, turn {i + 1},", turn, fields)}
            for i, (role, turn) in enumerate(self._turns)
        ]
        if not turns[-1]["content"].strip():
            raise ValueError(f"the verbalizer's last turn must not be empty, got {turns[-1]!r}")
        return [turn for turn in turns if turn["content"].strip()]


def normalise(language: str) -> str:
    """A code as it is compared: `zh_Hant` is zh-hant, `tl` is fil."""
    code = language.strip().lower().replace("_", "-")
    return ALIASES.get(code, code)


def codes(language: str) -> Iterator[str]:
    """A language's code, and those without its subtags: zh-hant-tw, zh-hant, zh."""
    code = normalise(language)
    while code:
        yield normalise(code)
        code = code.rpartition("-")[0]


def _checked_chain(chain: Any) -> list[tuple[str, str]]:
    """(role, source) of each turn."""
    if isinstance(chain, (str, Mapping)) or not isinstance(chain, Sequence):
        raise TypeError(f"chain must be a list of {{role: template}}, got {type(chain).__name__}")
    turns = []
    for i, turn in enumerate(chain):
        if not isinstance(turn, Mapping) or len(turn) != 1:
            raise TypeError(f"turn {i + 1} of the chain must be one {{role: template}}, got {turn}")
        ((role, source),) = turn.items()
        if role not in ROLES or not isinstance(source, str):
            raise ValueError(
                f"turn {i + 1} of the chain must have a role of {', '.join(ROLES)} and a template, "
                f"got {role!r}: {source!r}"
            )
        turns.append((role, source))
    if not turns or turns[-1][0] != "user":
        got = f"a turn of the {turns[-1][0]}" if turns else "no turn"
        raise ValueError(
            f"the chain must end with the user's turn, which the response follows, got {got}"
        )
    return turns


def _compiled(place: str, source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the verbalizer's {place} is not valid jinja2: line {error.lineno}: {error.message}"
        ) from None


def _names(source: str) -> set[str]:
    return jinja2.meta.find_undeclared_variables(_environment().parse(source))


def _rendered(place: str, template: jinja2.Template, fields: Mapping[str, Any]) -> str:
    try:
        return template.render(fields).rstrip("\n")
    except _AbsentField:
        names = _absent_and_printed(template, fields)
        raise ValueError(
            f"the verbalizer's {place} prints {' and '.join(names)}, "
            "which the row does not have; guard it with {% if ... %}"
        ) from None
    except jinja2.UndefinedError as error:
        raise ValueError(
            f"the verbalizer's {place} uses an unknown field: "
            f"{error.message}; the row has {', '.join(sorted(fields))}"
        ) from None
    except Exception as error:  # whatever a filter or an expression in a template raises
        raise ValueError(
            f"the verbalizer's {place} failed: {type(error).__name__}: {error}"
        ) from error


def _fields(row: Mapping[str, Any], language: str, code: str) -> dict[str, Any]:
    fields = dict.fromkeys(FIELDS)
    fields.update(row)
    fields["language"] = language
    fields["language_name"] = row.get("language_name") or LANGUAGE_NAMES.get(code, code)
    for name in CONTEXT_FIELDS:  # an empty string is no context either
        fields[name] = fields[name] or None
    return fields


def _absent_and_printed(template: jinja2.Template, fields: Mapping[str, Any]) -> list[str]:
    """Fields whose None makes the template fail: None alone among empty strings still fails."""
    absent = [name for name, value in fields.items() if value is None]
    culprits = []
    for name in absent:
        trial = {**fields, **dict.fromkeys(absent, ""), name: None}
        try:
            template.render(trial)
        except _AbsentField:
            culprits.append(repr(name))
        except Exception:
            continue
    return culprits or ["a value that is None"]
