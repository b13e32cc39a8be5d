"""Where the time of a training step goes: `Trainer.train_step` itself under clocks, not a copy of it.

Plain and compiled networks and the machine's matrix product take turns within one run, so that other work on the
machine slows all of them alike. The batch is made within the step, so that the phases add up; in a training run a
thread makes it while the step before is under way, which is faster where a core is free.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from arimg.bench.machine import (GemmClock, Operator, count_flops, describe, markdown_table, median, operator_table,
                                 timed, top_operators)
from arimg.devices import multiplies_bfloat16
from arimg.errors import InputError
from arimg.registry import OBJECTIVES
from arimg.train.loop import Trainer
from arimg.train.run import RunConfig

PHASES = ("batch", "forward", "backward", "optimiser")
WARM_UP = 2             # steps of each network before the first that counts; the first one compiles
SLOW_BATCH = 0.25       # share of the step from which on the preparation of batches is worth a remark

_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepTimes:
    """Medians over the measured steps of one network."""

    network: str                    # plain | compiled
    seconds: dict[str, float]       # by phase; optimiser = what is left: clipping, AdamW, EMA, the objective's own work
    step: float                     # seconds of the whole step
    images_per_second: float
    gemm_share: float               # FLOPs of a step / (forward + backward) / GEMM rate of the run's precision


@dataclass(frozen=True)
class TrainReport:
    """What `arimg bench train` measures."""

    run: str
    objective: str
    machine: str
    precision: str                  # float32 | bfloat16 | float16 (autocast)
    batch_size: int                 # samples of a step, in all its micro-batches
    parameters: int                 # trained ones
    steps: int                      # measured, per network
    step_flops: int                 # forward and backward of a step
    gemm_flops_per_second: dict[str, float]
    networks: tuple[StepTimes, ...]
    operators: tuple[Operator, ...]
    verdict: str


def bench_train(config: RunConfig, steps: int = 8, compare_compiled: bool = False) -> TrainReport:
    """Measure `steps` optimiser steps of a run as its config describes it; with `compare_compiled` both the plain and
    the compiled network. Writes no run folder, trains from the start. Raises InputError when nothing can compile."""
    if compare_compiled or config.train.compile:
        _check_compiler()
    objective = OBJECTIVES.load(config.objective)(config)
    with tempfile.TemporaryDirectory(prefix="arimg-bench-") as folder:
        trainer = Trainer(replace(config, train=replace(config.train, compile=False)), objective, Path(folder))
    for network in trainer.networks.values():
        network.train()
    variants = _variants(trainer, config.train.compile, compare_compiled)
    gemms = _gemm_clocks(trainer.accelerator.mixed_precision, trainer.accelerator.device)
    flops = _step_flops(trainer)
    laps = _run(trainer, variants, gemms, steps)
    trainer.networks = {name: learner.network for name, learner in trainer.learners.items()}
    operators = top_operators(trainer.train_step, trainer.accelerator.device)
    rates = {name: clock.rate for name, clock in gemms.items()}
    precision = _name(_PRECISIONS[trainer.accelerator.mixed_precision])
    samples = config.data.batch_size * config.train.accumulation
    times = tuple(_times(name, lap, samples, flops, rates[precision]) for name, lap in laps.items())
    parameters = sum(weight.numel() for network in trainer.networks.values() for weight in network.parameters()
                     if weight.requires_grad)
    return TrainReport(config.name, config.objective, describe(trainer.accelerator.device), precision, samples,
                       parameters, steps, flops, rates, times, operators, _verdict(times[-1], operators))


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise InputError(f"torch.compile needs the C++ compiler {compiler}, which is not installed; install it, set "
                         "CXX, or leave out --compile and use train.compile=false")


def _variants(trainer: Trainer, compiled: bool, both: bool) -> dict[str, dict[str, nn.Module]]:
    """The networks of all players, plain and / or compiled; they share their weights."""
    variants = {}
    if both or not compiled:
        variants["plain"] = trainer.networks
    if both or compiled:
        variants["compiled"] = {name: cast(nn.Module, torch.compile(network))
                                for name, network in trainer.networks.items()}
    return variants


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gemm_clocks(precision: str, device: torch.device) -> dict[str, GemmClock]:
    """float32, the run's precision, and bfloat16 where the device has units for it."""
    dtypes = dict.fromkeys([torch.float32, _PRECISIONS[precision],
                            *[torch.bfloat16] * multiplies_bfloat16(device)])
    return {_name(dtype): GemmClock(dtype, device) for dtype in dtypes}


def _step_flops(trainer: Trainer) -> int:
    """Of forward and backward of a step."""
    batch = tuple(tensor.to(trainer.accelerator.device) for tensor in trainer.batches.make(0))

    def step() -> None:
        losses, _ = trainer.objective.losses(trainer.networks, batch, 0)
        for loss in losses.values():
            trainer.accelerator.backward(loss)
    flops = count_flops(step) * trainer.config.train.accumulation
    for learner in trainer.learners.values():
        learner.optimizer.zero_grad()
    return flops


class _Clocks:
    """Seconds per phase of one step, taken around the trainer's own calls."""

    def __init__(self, trainer: Trainer) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = trainer.accelerator.device
        setattr(trainer.batches, "get", self.around("batch", trainer.batches.make))      # here and now, in no thread
        setattr(trainer.objective, "losses", self.around("forward", trainer.objective.losses))
        setattr(trainer.accelerator, "backward", self.around("backward", trainer.accelerator.backward))

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `phase`."""
        def call(*args: Any, **kwargs: Any) -> Any:
            seconds, result = timed(self._device, lambda: function(*args, **kwargs))
            self.seconds[phase] += seconds
            return result
        return call

    def step(self, trainer: Trainer, networks: dict[str, nn.Module]) -> dict[str, float]:
        """One training step through `networks`: seconds by phase, and of the whole step."""
        self.seconds.clear()
        trainer.networks = networks
        whole, _ = timed(self._device, trainer.train_step)
        return {**self.seconds, "optimiser": whole - sum(self.seconds.values()), "step": whole}


def _run(trainer: Trainer, variants: dict[str, dict[str, nn.Module]], gemms: dict[str, GemmClock],
         steps: int) -> dict[str, list[dict[str, float]]]:
    """Phase times of every measured step, by variant; these and the matrix products take turns."""
    clocks = _Clocks(trainer)
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for turn in tqdm(range(WARM_UP + steps), desc="steps", unit="turn", file=sys.stderr):
        for name, networks in variants.items():
            lap = clocks.step(trainer, networks)
            if turn >= WARM_UP:
                laps[name].append(lap)
        for clock in gemms.values():
            clock.measure()
    return laps


def _times(network: str, laps: list[dict[str, float]], samples: int, flops: int, rate: float) -> StepTimes:
    seconds = {phase: median(lap[phase] for lap in laps) for phase in PHASES}
    step = median(lap["step"] for lap in laps)
    through = median(lap["forward"] + lap["backward"] for lap in laps)
    return StepTimes(network, seconds, step, samples / step, flops / through / rate)


def _verdict(times: StepTimes, operators: tuple[Operator, ...]) -> str:
    """One line: what to work on."""
    shares = {phase: seconds / times.step for phase, seconds in times.seconds.items()}
    largest = max(shares, key=lambda phase: shares[phase])
    remark = ""
    if shares["batch"] >= SLOW_BATCH and largest != "batch":
        remark = f"; preparing the batch costs another {shares['batch']:.0%}"
    return (f"{largest} dominates the {times.network} step with {shares[largest]:.0%}; forward and backward run at "
            f"{times.gemm_share:.0%} of the GEMM rate; the largest operator is {operators[0].name} with "
            f"{operators[0].share:.0%}{remark}")


def to_markdown(report: TrainReport) -> str:
    """The report as a page."""
    names = [times.network for times in report.networks]
    rows = [[phase, *[cell for times in report.networks for cell in
                      (f"{times.seconds[phase] * 1e3:.1f}", f"{times.seconds[phase] / times.step:.0%}")]]
            for phase in PHASES]
    rows.append(["whole step", *[cell for times in report.networks for cell in (f"{times.step * 1e3:.1f}", "")]])
    rows.append(["images/s", *[cell for times in report.networks
                               for cell in (f"{times.images_per_second:.1f}", "")]])
    rows.append(["share of GEMM rate", *[cell for times in report.networks
                                         for cell in ("", f"{times.gemm_share:.0%}")]])
    gemms = ", ".join(f"{name} {rate / 1e9:.1f} GFLOP/s" for name, rate in report.gemm_flops_per_second.items())
    return "\n".join([
        f"# {report.run}: a training step of objective {report.objective}", "",
        f"{report.parameters / 1e6:.2f} M trained parameters, batch {report.batch_size}, {report.precision}; "
        f"{report.machine}.",
        f"Medians of {report.steps} steps, each making its own batch (a training run makes it in a thread, one step "
        "ahead).", f"Forward and backward of a step: {report.step_flops / 1e9:.2f} GFLOP. "
        f"GEMM 1024x1024x1024: {gemms}.", "",
        markdown_table(["phase", *[cell for name in names for cell in (f"{name}, ms", "share")]], rows), "",
        operator_table("operator of a plain step", report.operators), "",
        f"{report.verdict}."])
