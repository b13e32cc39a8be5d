"""Names of devices and precisions, and what "auto" means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from arimg.errors import InputError, UnknownNameError

log = logging.getLogger("arimg")

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64, "fp64": torch.float64,
}


def find_device(name: str | torch.device) -> torch.device:
    """"auto" is the first CUDA device if there is one, else the CPU. Raises InputError on a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()             # "meta" holds no numbers to copy
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"device {str(name)!r} cannot be used here ({str(error).splitlines()[0][:120]}); "
                         "use auto, cpu or cuda") from error
    return device


def find_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """"auto" is bfloat16 on CUDA, else float32, in which `jacobi` paints the codes of `ar` and no picture depends on
    its batch. Raises UnknownNameError."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UnknownNameError("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def training_precision(name: str, device: torch.device) -> str:
    """The autocast to train in ("no", "bf16", "fp16"): "bf16" becomes "no" on a CPU that does not multiply it, where
    emulated products take about eighty times as long as those of float32 (docs/bench.md). Logs that."""
    if name == "bf16" and device.type == "cpu" and not multiplies_bfloat16(device):
        log.warning("precision bf16: this CPU has no bfloat16 units; the run computes in float32, which is faster here")
        return "no"
    return name


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for it."""
    return device.type == "cuda" or device.type == "cpu" and _cpu_multiplies_bfloat16()


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether Linux lists AVX512-BF16 or AMX; elsewhere nobody says, so no."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 on the device, without waiting for what it does."""
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    return torch.tensor(numbers, pin_memory=True).to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked, so that a clock read afterwards is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
