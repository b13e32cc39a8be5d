"""Controllable autoregressive image generation: a control image goes in, a model paints along its lines."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "list_models", "__version__"]

_LAZY = {"Pipeline": "arimg.pipeline", "list_models": "arimg.checkpoints"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'arimg' has no attribute {name!r}; it has {', '.join(__all__)}")
