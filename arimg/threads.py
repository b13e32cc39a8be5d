"""How many threads a decode runs on. Small products are over before a second thread has begun: the embedded model
decodes plainly on one thread faster than on two (docs/bench.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from arimg.quantize import weight_sizes

CACHED = 32e6               # bytes of weights up to which one thread is not held up by memory
SMALL = 5e6                 # FLOPs of an average operator of a layer that are not worth a second thread
OPERATORS = 35              # of a layer

_THREADS_VARIABLE = "OMP_NUM_THREADS"


def decode_threads(network: nn.Module, positions: int) -> int | None:
    """Threads for passes over so many positions (of all rows): 1, or None for torch's own number.

    None as well off the CPU, for a network whose number of layers is not known, and where the user has set
    OMP_NUM_THREADS.
    """
    size, numbers = weight_sizes(network)
    layers = getattr(getattr(network, "config", None), "layers", None)
    if layers is None or next(network.parameters()).device.type != "cpu" or _THREADS_VARIABLE in os.environ:
        return None
    flops = 2 * positions * numbers
    return 1 if size <= CACHED and flops <= SMALL * OPERATORS * layers else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch compute on `count` threads inside the block, and as before after it. None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
