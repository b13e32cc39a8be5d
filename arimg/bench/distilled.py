"""What one pass of a student costs beside plain decoding with its teacher, on random weights: nothing here depends on
their values."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, Guidance, Sampling
from arimg.accel.dd1 import Dd1
from arimg.accel.target import Target, branch_scales
from arimg.bench.machine import (GemmClock, Lap, Operator, count_flops, describe, lapped, markdown_table, median,
                                 operator_table, top_operators)
from arimg.errors import UnknownNameError
from arimg.inference import lay_out
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.models.students import ARStudent
from arimg.presets import AR_PRESETS
from arimg.threads import cpu_threads, decode_threads
from arimg.tokenizers.vq import VQSpace

CHANNELS = 8            # of a code vector
SHAPES: dict[str, dict[str, Any]] = {       # fields of ARConfig; 256 tokens
    "emoji": {"vocab_size": 4096, "dim": 192, "layers": 10, "heads": 6, "ffn_hidden": 512, "num_classes": 36,
              "rope_prefix": "identity", "rope_grid": "true", "codebook_dim": CHANNELS},
    **{f"llamagen-{name}": preset.config() for name, preset in AR_PRESETS.items()},
}
GRID = (16, 16)
STUDENT_RUNS = 5        # per repeat


@dataclass(frozen=True)
class OnePass:
    """One batch; medians over the repeats."""

    shape: str
    batch: int
    cfg: float
    plain: Lap                  # of all tokens, plain decoding
    student: Lap                # the same, one pass of the student
    flops: int                  # of that pass
    gemm: Lap                   # what these FLOPs take at the machine's rate, measured in the same turns
    operators: tuple[Operator, ...]

    def speed_up(self, clock: str = "seconds") -> float:
        """Plain decoding's time over the student's."""
        return float(getattr(self.plain, clock) / getattr(self.student, clock))

    def over_limit(self, clock: str = "seconds") -> float:
        """The student's time over that of its FLOPs at the machine's rate of matrix products."""
        return float(getattr(self.student, clock) / getattr(self.gemm, clock))


@dataclass(frozen=True)
class DistilledReport:
    """What `arimg bench distilled` measures."""

    machine: str
    dtype: str
    repeats: int
    compiled: bool              # the student
    rows: tuple[OnePass, ...]


@torch.no_grad()
def bench_distilled(shapes: Sequence[str], batches: Sequence[int], cfg: float, repeats: int, device: torch.device,
                    dtype: torch.dtype, compiled: bool = False) -> DistilledReport:
    """Decode the same requests with a teacher and with its student, in turns; `compiled`: the student through
    torch.compile. Raises UnknownNameError."""
    for name in shapes:
        if name not in SHAPES:
            raise UnknownNameError("shape", name, SHAPES)
    rows = []
    with tqdm(total=len(shapes) * len(batches) * repeats, unit="turn", file=sys.stderr) as bar:
        for name in shapes:
            teacher, student = networks(name, device, dtype)
            fast = copy.deepcopy(student)
            lay_out(fast)
            if compiled:
                fast.compile_pass()
            for batch in batches:
                rows.append(_measured(name, teacher, student, fast, batch, cfg, repeats, bar.update))
    return DistilledReport(describe(device), str(dtype).removeprefix("torch."), repeats, compiled, tuple(rows))


def networks(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[ARTransformer, ARStudent]:
    """A teacher with random weights and its new student, as a pipeline loads them."""
    teacher = ARTransformer(ARConfig(**SHAPES[shape]))
    nn.init.normal_(teacher.output.weight, std=0.02)
    student = ARStudent.from_teacher(teacher, CHANNELS)
    for network in (teacher, student):
        lay_out(network.to(device, dtype).eval())
    return teacher, student


def _measured(shape: str, teacher: ARTransformer, student: ARStudent, fast: ARStudent, batch: int, cfg: float,
              repeats: int, advance: Callable[[], object]) -> OnePass:
    """Turns of plain decoding, the student and the machine's matrix product. `fast` is the student that is timed, which
    may be compiled; FLOPs are counted in the other."""
    device, vocab = teacher.norm.weight.device, teacher.vocab_size
    codebook_VC = F.normalize(torch.linspace(-1, 1, vocab * CHANNELS).cos().view(vocab, CHANNELS), dim=-1)
    request = DecodeRequest(Condition(class_ids_B=torch.zeros(batch, dtype=torch.int64, device=device)), GRID,
                            torch.arange(batch, device=device), guidance=Guidance(cfg), sampling=Sampling(),
                            space=VQSpace(codebook_VC.to(device)))
    branches = len(branch_scales(request.guidance, controlled=False))
    plain = _decode(PlainAR(), teacher, request, batch * branches)
    one_step = _decode(Dd1(fast), teacher, request, batch * request.length)
    clock, laps = GemmClock(teacher.norm.weight.dtype, device), dict[str, list[Lap]](plain=[], student=[])
    flops = count_flops(_decode(Dd1(student), teacher, request, batch * request.length))
    one_step()                                      # the warm-up
    for _ in range(repeats):
        laps["plain"].append(lapped(device, plain)[0])
        for _ in range(STUDENT_RUNS):
            laps["student"].append(lapped(device, one_step)[0])
            clock.measure()
        advance()
    medians = {name: Lap(median(lap.seconds for lap in all_laps), median(lap.cpu_seconds for lap in all_laps))
               for name, all_laps in laps.items()}
    return OnePass(shape, batch, cfg, medians["plain"], medians["student"], flops,
                   Lap(flops / clock.rate, flops / clock.cpu_rate), top_operators(one_step, device))


def _decode(decoder: Decoder, teacher: ARTransformer, request: DecodeRequest, positions: int) -> Callable[[], Any]:
    """The token stage as the pipeline runs it."""
    def run() -> None:
        with cpu_threads(decode_threads(teacher, positions)):
            decoder.decode(Target(teacher, request), request)
    return run


def to_markdown(report: DistilledReport) -> str:
    """The report as a page."""
    header = ("shape", "batch", "cfg", "clock", "plain, s", "one pass, s", "speed-up", "GFLOP", "GEMM, GFLOP/s",
              "over the limit")
    clocks = {"wall": "seconds", "processor": "cpu_seconds"}
    rows = [[row.shape, str(row.batch), f"{row.cfg:g}", name, f"{getattr(row.plain, clock):.3f}",
             f"{getattr(row.student, clock):.4f}", f"{row.speed_up(clock):.1f}x", f"{row.flops / 1e9:.2f}",
             f"{row.flops / getattr(row.gemm, clock) / 1e9:.1f}", f"{row.over_limit(clock):.2f}x"]
            for row in report.rows for name, clock in clocks.items()]
    tables = [operator_table(f"one pass, {row.shape}, batch {row.batch}", row.operators) for row in report.rows]
    return "\n\n".join([
        "# One pass of a student beside plain decoding",
        f"256 tokens; random weights; {report.repeats} repeats in turns; {report.dtype}; {report.machine}"
        f"{'; the student compiled' if report.compiled else ''}. The limit "
        "is the pass's FLOPs at the machine's rate of 1024x1024x1024 products. On a busy machine processor time is the "
        "steadier clock.",
        markdown_table(header, rows), *tables])
