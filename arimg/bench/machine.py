"""What the machine can do, and clocks that wait for the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from arimg.devices import synchronize

T = TypeVar("T")

GEMM_SIDE = 1024


def timed(device: torch.device, function: Callable[[], T]) -> tuple[float, T]:
    """(seconds, result) of one call; the device is idle before and after."""
    synchronize(device)
    began = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - began, result


def median(values: Iterable[float]) -> float:
    """The median as a plain float."""
    return float(statistics.median(values))


class GemmClock:
    """The machine's rate at C = A B of 1024 x 1024 matrices, on all threads of torch. Measure it between the runs that
    are compared with it: other work on the machine then slows both."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._left = torch.linspace(-1, 1, GEMM_SIDE ** 2).unflatten(0, (GEMM_SIDE, -1)).to(device, dtype)
        self._right = self._left.flip(0)
        self._seconds: list[float] = []
        _ = self._left @ self._right                        # the first call chooses and loads the kernel

    def measure(self) -> None:
        """One more measurement."""
        self._seconds.append(timed(self._device, lambda: self._left @ self._right)[0])

    @property
    def rate(self) -> float:
        """FLOP/s, the median of all measurements."""
        return 2 * GEMM_SIDE ** 3 / median(self._seconds)


def describe(device: torch.device) -> str:
    """The device in a few words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
            f"torch {torch.__version__}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
