from typing import Any


def read_lexicon(path: Any, languages: Any = None) -> Any: ...
def lexicon_verbalizer(
    entries: Any,
    teacher: Any,
    student: Any,
    base: Any,
    *,
    kind: str = "lexicon",
    share: float = 0.5,
) -> Any: ...
