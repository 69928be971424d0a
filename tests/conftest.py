"""Triton's kernels are interpreted. That must be known before anything imports triton, as libraries
that transformers imports do."""

import os

os.environ["TRITON_INTERPRET"] = "1"

# Tests read what rich prints: as wide as they say, without colours, whatever terminal runs them.
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
