"""puna adapts Llama-family language models and proves what was gained and what it cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Heavy rooms load on first use, so that ``import puna`` takes no time.
_HOMES = {
    "load": "puna.text.pretrained",
    "save": "puna.text.pretrained",
    "Engine": "puna.decode.engine",
    "Sampling": "puna.decode.sampling",
    "Corpus": "puna.data.corpus",
    "PunaError": "puna.core.errors",
}

if TYPE_CHECKING:
    from puna.core.errors import PunaError
    from puna.data.corpus import Corpus
    from puna.decode.engine import Engine
    from puna.decode.sampling import Sampling
    from puna.run.runner import run
    from puna.text.pretrained import load, save

__all__ = ["Corpus", "Engine", "PunaError", "Sampling", "__version__", "load", "run", "save"]


def __getattr__(name: str) -> Any:
    if name == "run":  # The room itself can be called; importing it puts it here for good.
        return importlib.import_module("puna.run")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'puna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
