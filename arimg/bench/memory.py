"""Peak memory of a computation.

The process's own figures do not serve: `ru_maxrss` never falls, so that whatever ran before hides what is measured, and
tracemalloc does not see torch's memory. On CUDA the allocator keeps a peak that can be reset. Elsewhere the storages of
all tensors that come into being are counted from birth to death; scratch space inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def peak_memory(device: torch.device, function: Callable[[], T]) -> tuple[int, T]:
    """(bytes, result): the most that tensors made by one call held at once. Slows the call down on the CPU."""
    if device.type != "cuda":
        with TensorBytes() as counter:
            result = function()
        return counter.peak, result
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    return torch.cuda.max_memory_allocated(device) - before, result


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: `now` alive, `peak` the most alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note what it made."""
        out = func(*args, **(kwargs or {}))
        if _makes_new(func):
            for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
                if isinstance(leaf, Tensor):
                    storage = leaf.untyped_storage()
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@cache
def _makes_new(operator: Any) -> bool:
    """Whether its results are neither views nor its own arguments."""
    return all(returned.alias_info is None for returned in operator._schema.returns)
