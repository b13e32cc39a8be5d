"""Freed memory stays with the process, so that the next pass finds its pages mapped: `keep_freed_memory`."""

from __future__ import annotations

import ctypes
import os
import sys

_SETTINGS = {           # glibc's malloc.h
    -4: 0,              # M_MMAP_MAX, blocks mapped one by one, which freeing would unmap: none
    -1: 1 << 30,        # M_TRIM_THRESHOLD, bytes of free memory at the end of the heap that are kept
    -2: 64 << 20,       # M_TOP_PAD, bytes by which the heap grows
}


def keep_freed_memory() -> None:
    """Tell glibc to hold on to up to 1 GiB of freed memory; other C libraries and a user's own tuning stay alone.

    As it comes, it gives pages back as soon as a few tensors are free, and the kernel zeroes them again, one by one, in
    the next layer: a quarter of the time of a batch of the embedded model (docs/bench.md).
    """
    if sys.platform != "linux" or any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in _SETTINGS.items():
            set_option(option, value)
