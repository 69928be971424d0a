"""Triton's kernels are interpreted. That must be known before anything imports triton, as libraries
that transformers imports do."""

import os

os.environ["TRITON_INTERPRET"] = "1"
