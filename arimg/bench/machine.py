"""What the machine can do, and clocks that wait for the device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from arimg.devices import synchronize

T = TypeVar("T")

GEMM_SIDE = 1024
READ_BYTES = 1 << 30
SHOWN_OPERATORS = 10

# Of CPUs' kernels torch's counter knows only some.
_CPU_KERNELS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}
if torch.backends.mkldnn.is_available():
    _CPU_KERNELS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]


def timed(device: torch.device, function: Callable[[], T]) -> tuple[float, T]:
    """(seconds, result) of one call; the device is idle before and after."""
    synchronize(device)
    began = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - began, result


@dataclass(frozen=True)
class Lap:
    """What one call took. On a busy machine the processor's time is the steadier of the two; threads that wait for one
    another count in it."""

    seconds: float
    cpu_seconds: float      # of all threads of this process


def lapped(device: torch.device, function: Callable[[], T]) -> tuple[Lap, T]:
    """(lap, result) of one call."""
    began = time.process_time()
    seconds, result = timed(device, function)
    return Lap(seconds, time.process_time() - began), result


def median(values: Iterable[float]) -> float:
    """The median as a plain float."""
    return float(statistics.median(values))


class RateClock:
    """A rate of the machine on all threads of torch: the median of measurements made between the runs that are compared
    with it, as other work on the machine slows both."""

    def __init__(self, device: torch.device, amount: float, work: Callable[[], Any]) -> None:
        self._device, self._amount, self._work = device, amount, work
        self._laps: list[Lap] = []
        work()                                  # the first call chooses and loads the kernel

    def measure(self) -> None:
        """One more measurement."""
        self._laps.append(lapped(self._device, self._work)[0])

    @property
    def rate(self) -> float:
        """Per second."""
        return self._amount / median(lap.seconds for lap in self._laps)

    @property
    def cpu_rate(self) -> float:
        """Per second of processor time, one thread's rate."""
        return self._amount / median(lap.cpu_seconds for lap in self._laps)


class GemmClock(RateClock):
    """FLOP/s of C = A B of 1024 x 1024 matrices."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        left = torch.linspace(-1, 1, GEMM_SIDE ** 2).unflatten(0, (GEMM_SIDE, -1)).to(device, dtype)
        right = left.flip(0)
        super().__init__(device, 2 * GEMM_SIDE ** 3, lambda: left @ right)


class ReadClock(RateClock):
    """bytes/s of the sum of 1 GiB of float32."""

    def __init__(self, device: torch.device, size: int = READ_BYTES) -> None:
        super().__init__(device, size, torch.zeros(size // 4, device=device).sum)


@dataclass(frozen=True)
class Operator:
    """One row of a profile."""

    name: str
    calls: int
    seconds: float                  # by itself, without the operators it calls
    share: float                    # of all operators


def top_operators(function: Callable[[], Any], device: torch.device) -> tuple[Operator, ...]:
    """The operators of one call with the most time of their own, on the device that computes."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]) as profiler:
        function()
    rows = [(event.key, event.count, (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6)
            for event in profiler.key_averages()]
    total = sum(seconds for *_, seconds in rows)
    rows.sort(key=lambda row: -row[2])
    return tuple(Operator(name, calls, seconds, seconds / total) for name, calls, seconds in rows[:SHOWN_OPERATORS])


def operator_table(title: str, operators: Sequence[Operator]) -> str:
    """Markdown."""
    return markdown_table([title, "calls", "self, ms", "share"],
                          [[f"`{one.name}`", str(one.calls), f"{one.seconds * 1e3:.1f}", f"{one.share:.0%}"]
                           for one in operators])


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention in one call, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS) as counter:
        function()
    return int(counter.get_total_flops())


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
