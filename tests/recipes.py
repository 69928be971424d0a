"""The code blocks of docs/backends.md, as the tests run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"


def recipe(defines: str) -> Any:
    """The class of that name, from the block that defines it."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (block,) = (b for b in blocks if f"class {defines}(" in b[1])
    lines_before = text[: block.start(1)].count("\n")
    scope: dict[str, Any] = {"__name__": "recipe"}
    exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), scope)  # lines as on the page
    return scope[defines]
