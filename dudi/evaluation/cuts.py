"""What the limits on tokens cut: counted by task and language, and told beside the figures.

Each row keeps how many tokens of its prompt, of the teacher's prompt and of its reference were left
out, and whether a generation ran into the limit; what is said is made of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dudi.evaluation.items import ALL

Row = Mapping[str, Any]
PROMPT, COMPLETION = "max_prompt_length", "max_completion_length"


class Cut(NamedTuple):
    key: str  # of a row: 0 where nothing was cut, absent where nothing could be
    told: str
    limit: str  # the argument
    effect: str


CUTS = {
    "prompts": Cut("prompt_left_out", "prompts were cut", PROMPT, "their middle was not read"),
    "teacher_prompts": Cut(
        "teacher_prompt_left_out", "prompts of the teacher were cut", PROMPT,
        "it did not read their middle",
    ),
    "references": Cut(
        "completion_left_out", "references were cut", COMPLETION,
        "likelihoods are of their beginnings",
    ),
    "generations": Cut(
        "unended", "generations had no end", COMPLETION, "what was written until then is judged"
    ),
}  # fmt: skip
OF_WHOLE = "chrF++ and length ratio of the whole"


def counted(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, int]]]:
    """{what: {language: {"cut": how many, "of": how many}}}"""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, cut in CUTS.items():
        languages: dict[str, dict[str, int]] = defaultdict(lambda: {"cut": 0, "of": 0})
        for row in rows:
            if cut.key in row:
                languages[row["language"]]["cut"] += row[cut.key] > 0
                languages[row["language"]]["of"] += 1
        if languages:
            found[name] = dict(sorted(languages.items()))
    return found


def told(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind of text of which any was cut."""
    sentences = []
    for name, languages in counted(rows).items():
        cut, of = (sum(own[key] for own in languages.values()) for key in ("cut", "of"))
        if not cut:
            continue
        known = CUTS[name]
        limit = f"{known.limit} {settings.get(known.limit, '')}".rstrip()
        text = f"{cut} of {of} {known.told} {'within' if name == 'generations' else 'to'} {limit}"
        own = [f"{code} {n['cut']}/{n['of']}" for code, n in languages.items() if n["cut"]]
        if set(languages) != {ALL}:
            text += f" ({', '.join(own)})"
        text += f": {known.effect}"
        if name == "references" and any("reference" in row or "chrf" in row for row in rows):
            text += f", {OF_WHOLE}"
        sentences.append(text)
    return sentences
