"""Where fetched evaluation data lies."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DUDI_EVAL_DATA"


def default_folder() -> Path:
    """$DUDI_EVAL_DATA, or dudi/eval-data in the user's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "dudi" / "eval-data"
