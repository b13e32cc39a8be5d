"""Kernels of our own, in C++: built when they are first needed, by the compiler and in the cache of torch.compile.

Each file NAME.cpp registers torch.ops.arimg operators; NAME.py has their Python side.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from pathlib import Path

log = logging.getLogger("arimg")

_FOLDER = Path(__file__).parent
_FLAGS = ("-ftree-loop-vectorize",)     # off in torch.compile, which writes its loops as vectors
_READY: set[str] = set()


def is_ready(name: str) -> bool:
    """Whether something in this process has built NAME.cpp."""
    return name in _READY


@cache
def build_error(name: str) -> str | None:
    """Build the kernels of NAME.cpp unless this machine has them, and register them. None, or why they cannot run here:
    no C++ compiler, or a processor without what the file asks for."""
    try:
        from torch._inductor.codecache import CppCodeCache
        log.info("kernel %s: building it, unless this machine has it already (up to a minute, once)", name)
        CppCodeCache.load((_FOLDER / f"{name}.cpp").read_text(), extra_flags=_FLAGS)
        import_module(f"arimg.kernels.{name}").register()
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError) as error:
        return str(error).strip().splitlines()[0]
    _READY.add(name)
    return None
