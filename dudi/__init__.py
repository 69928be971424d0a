"""DuDi: dual-signal distillation with a cross-lingual verbalizer (arXiv 2606.04694)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dudi.config import DuDiConfig
    from dudi.export import export_model
    from dudi.trainer import DuDiTrainer
    from dudi.verbalize import ContextVerbalizer

__version__ = "0.1.0"
__all__ = ["ContextVerbalizer", "DuDiConfig", "DuDiTrainer", "__version__", "export_model"]

_HOMES = {
    "ContextVerbalizer": "dudi.verbalize",
    "DuDiConfig": "dudi.config",
    "DuDiTrainer": "dudi.trainer",
    "export_model": "dudi.export",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562): `import dudi` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
