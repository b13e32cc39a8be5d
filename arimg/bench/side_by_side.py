"""The original and arimg in one process, in turns, with the same weights: training steps, decoding, pixels."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from arimg.bench.machine import (GemmClock, Lap, Operator, ReadClock, count_flops, describe, lapped, markdown_table,
                                 median, operator_table, top_operators)
from arimg.bench.original import RECIPE, ARPair, VQPair
from arimg.devices import multiplies_bfloat16, training_precision
from arimg.inference import lay_out
from arimg.models.ar import ARTransformer
from arimg.quantize import quantize, weight_sizes

CPU = torch.device("cpu")       # the original's loops are made for one device; this is the one that everybody has
THEIRS, OURS = "original", "arimg"


@dataclass(frozen=True)
class Side:
    """One of the two; medians over the turns."""

    name: str
    phases: dict[str, Lap]      # part of the work -> what it took; the last one is the whole
    share: float                # of the machine's limit, by processor time
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Comparison:
    """What `scripts/bench_original.py` measures."""

    title: str
    machine: str
    turns: int
    limit: str                  # the machine's rate that shares are of, in words
    agreement: str              # how far results for equal inputs differ, in words
    sides: tuple[Side, ...]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as the original each of ours is, by processor time."""
        theirs, *ours = (side.phases["whole"].cpu_seconds for side in self.sides)
        return {side.name: theirs / seconds for side, seconds in zip(self.sides[1:], ours)}


Phases = dict[str, Callable[[], Any]]       # done in this order; each is on the clock by itself


def compare(runs: dict[str, Phases], between: Sequence[Callable[[], None]], turns: int) -> dict[str, dict[str, Lap]]:
    """Medians per run and phase, the whole last. One turn warms up; `between` is done once a turn."""
    laps: dict[str, list[dict[str, Lap]]] = {name: [] for name in runs}
    for turn in tqdm(range(1 + turns), desc="turns", unit="turn", file=sys.stderr):
        for name, phases in runs.items():
            lap = {phase: lapped(CPU, work)[0] for phase, work in phases.items()}
            lap["whole"] = Lap(sum(one.seconds for one in lap.values()), sum(one.cpu_seconds for one in lap.values()))
            if turn:
                laps[name].append(lap)
        for measure in between:
            measure()
    return {name: {phase: Lap(median(lap[phase].seconds for lap in own), median(lap[phase].cpu_seconds for lap in own))
                   for phase in own[0]} for name, own in laps.items()}


def _sides(laps: dict[str, dict[str, Lap]], best: float, runs: dict[str, Phases]) -> tuple[Side, ...]:
    """`best`: processor seconds that the work takes at the machine's limit."""
    sides = []
    for name, phases in runs.items():
        def all_phases(phases: Phases = phases) -> None:
            for work in phases.values():
                work()
        sides.append(Side(name, laps[name], best / laps[name]["whole"].cpu_seconds, top_operators(all_phases, CPU)))
    return tuple(sides)


def bench_training(pair: ARPair, batch: int, turns: int, bfloat16: bool = False,
                   compiled: bool = False) -> Comparison:
    """Forward, backward, and clipping with AdamW, on whole sequences; dropout as published.

    `bfloat16`: autocast for the original, and what a run of ours with precision bf16 does on this machine. `compiled`:
    ours with train.compile as well."""
    cells, vocabulary = pair.config.block_size, pair.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    codes_BL = torch.randint(vocabulary, (batch, cells), generator=generator)
    class_ids_B = torch.randint(pair.config.num_classes, (batch,), generator=generator)
    ours = torch.bfloat16 if bfloat16 and training_precision("bf16", CPU) == "bf16" else torch.float32
    pair.ours.eval()
    agreement = _loss_difference(pair, codes_BL, class_ids_B)
    pair.train()
    runs = {
        THEIRS: _step_phases(pair.theirs, lambda: pair.their_loss(codes_BL, class_ids_B), pair.their_optimizer(),
                             bfloat16),
        OURS: _step_phases(pair.ours, lambda: pair.our_loss(codes_BL, class_ids_B), pair.our_optimizer(),
                           ours == torch.bfloat16)}
    if compiled:
        graph = replace(pair, ours=cast(ARTransformer, torch.compile(pair.ours)))
        runs[f"{OURS} compiled"] = _step_phases(pair.ours, lambda: graph.our_loss(codes_BL, class_ids_B),
                                                pair.our_optimizer(), ours == torch.bfloat16)
    flops = count_flops(lambda: pair.our_loss(codes_BL, class_ids_B).backward())
    pair.ours.zero_grad()
    clocks = {kind: GemmClock(kind, CPU) for kind in (torch.float32, *[torch.bfloat16] * bfloat16)}
    laps = compare(runs, [clock.measure for clock in clocks.values()], turns)
    rates = ", ".join(f"{_name(kind)} {clock.cpu_rate / 1e9:.1f} GFLOP/s" for kind, clock in clocks.items())
    precision = f"the original in bfloat16 autocast, arimg in {_name(ours)}" if bfloat16 else "float32"
    return Comparison(f"training step, batch {batch} of {cells} tokens, {precision}", describe(CPU), turns,
                      f"{flops / 1e9:.0f} GFLOP per step; GEMM 1024x1024x1024, per thread: {rates}; the share is of "
                      f"the {_name(ours)} rate", agreement, _sides(laps, flops / clocks[ours].cpu_rate, runs))


def _step_phases(network: nn.Module, loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer,
                 bfloat16: bool) -> Phases:
    loss: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            loss[:] = [loss_of()]

    def optimise() -> None:
        nn.utils.clip_grad_norm_(network.parameters(), RECIPE.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"forward": forward, "backward": lambda: loss[0].backward(), "optimiser": optimise}


def _loss_difference(pair: ARPair, codes_BL: torch.Tensor, class_ids_B: torch.Tensor) -> str:
    """Without dropout, which the original has in its training mode only: its inference arithmetic, same codes."""
    pair.theirs.eval()
    slots_S = torch.arange(codes_BL.shape[1])
    with torch.no_grad():
        # Its training pass in eval mode: positions are given, and without a mask it is causal.
        theirs = float(pair.theirs(cond_idx=class_ids_B, idx=codes_BL[:, :-1], input_pos=slots_S, targets=codes_BL)[1])
        ours = float(pair.our_loss(codes_BL, class_ids_B))
    return f"loss without dropout: {theirs:.6f} and {ours:.6f}"


@torch.no_grad()
def bench_decoding(pair: ARPair, tokens: int, cfg: float, turns: int, formats: Sequence[str] = (),
                   compiled: bool = False) -> Comparison:
    """Plain decoding of one picture of `tokens` tokens; ours also with weights quantised to each of `formats`, and if
    `compiled` all of ours through torch.compile as well."""
    pair.eval()
    runs: dict[str, Phases] = {THEIRS: {"codes": lambda: pair.their_codes(7, tokens, cfg)},
                               OURS: {"codes": lambda: pair.our_codes(7, tokens, cfg)}}
    if compiled:
        runs[f"{OURS} compiled"] = {"codes": partial(compiled_pair(pair).our_codes, 7, tokens, cfg)}
    for name in formats:
        for side, small in quantised_pairs(pair, name, compiled).items():
            runs[side] = {"codes": partial(small.our_codes, 7, tokens, cfg)}
    read = weight_sizes(pair.ours)[0]
    clock = ReadClock(CPU)
    laps = compare(runs, [clock.measure], turns)
    kinds = precisions(dtype_of(pair.theirs), dtype_of(pair.ours))
    return Comparison(f"{tokens} tokens, guidance {cfg:g}, batch 1, {kinds}", describe(CPU), turns,
                      f"{read / 1e6:.0f} MB of weights per pass;"
                      f" reading 1 GiB, per thread: {clock.cpu_rate / 1e9:.1f} GB/s, "
                      f"so a token takes {read / clock.cpu_rate * 1e3:.1f} ms of processor time at least",
                      "each draws its own codes", _sides(laps, tokens * read / clock.cpu_rate, runs))


def quantised_pairs(pair: ARPair, name: str, compiled: bool) -> dict[str, ARPair]:
    """Our side with quantised weights, the rest in float32 on a CPU without units for bfloat16; `compiled`: the same
    through torch.compile as well."""
    rest = dtype_of(pair.ours) if multiplies_bfloat16(CPU) else torch.float32

    def small() -> ARTransformer:
        return cast(ARTransformer, lay_out(quantize(copy.deepcopy(pair.ours), name).to(rest)))
    pairs = {f"{OURS} {name}": replace(pair, ours=small())}
    if compiled:
        pairs[f"{OURS} {name} compiled"] = compiled_pair(replace(pair, ours=small()))
    return pairs


def compiled_pair(pair: ARPair) -> ARPair:
    """Our side through torch.compile."""
    network = cast(ARTransformer, lay_out(copy.deepcopy(pair.ours)))
    network.compile_step()
    return replace(pair, ours=network)


@torch.no_grad()
def bench_pixels(pair: VQPair, side: int, turns: int) -> Comparison:
    """Codes of one square picture of `side` pixels to pixels."""
    grid = (side // pair.ours.stride, side // pair.ours.stride)
    codes_BL = torch.randint(pair.ours.vocab_size, (1, grid[0] * grid[1]), generator=torch.Generator().manual_seed(1))
    difference = (pair.their_pixels(codes_BL, grid) - pair.our_pixels(codes_BL, grid)).abs().max()
    runs: dict[str, Phases] = {THEIRS: {"pixels": lambda: pair.their_pixels(codes_BL, grid)},
                               OURS: {"pixels": lambda: pair.our_pixels(codes_BL, grid)}}
    flops, clock = count_flops(runs[THEIRS]["pixels"]), GemmClock(torch.float32, CPU)
    laps = compare(runs, [clock.measure], turns)
    return Comparison(f"codes to {side}x{side} pixels, {precisions(torch.float32, pair.dtype)}", describe(CPU), turns,
                      f"{flops / 1e9:.0f} GFLOP in the original; GEMM 1024x1024x1024, per thread: "
                      f"{clock.cpu_rate / 1e9:.1f} GFLOP/s",
                      f"largest difference of a pixel in [-1, 1]: {float(difference):.1e}",
                      _sides(laps, flops / clock.cpu_rate, runs))


def precisions(theirs: torch.dtype, ours: torch.dtype) -> str:
    """Of the original and of ours, in words."""
    return _name(ours) if ours == theirs else f"{_name(theirs)}, {OURS} in {_name(ours)}"


def dtype_of(network: nn.Module) -> torch.dtype:
    """The precision of its weights."""
    return next(network.parameters()).dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_markdown(comparison: Comparison) -> str:
    """The comparison as a page."""
    phases = [phase for phase in comparison.sides[0].phases if len(comparison.sides[0].phases) > 2 or phase != "whole"]
    rows = [[phase, *[cell for side in comparison.sides for cell in
                      (f"{side.phases[phase].seconds:.3f}", f"{side.phases[phase].cpu_seconds:.3f}")]]
            for phase in phases]
    rows.append(["share of the limit", *[cell for side in comparison.sides for cell in (f"{side.share:.0%}", "")]])
    header = ["", *[cell for side in comparison.sides for cell in (f"{side.name}, s", "CPU s")]]
    return "\n\n".join([
        f"## {comparison.title}",
        f"Medians of {comparison.turns} turns; {comparison.machine}. {comparison.limit}. "
        f"{comparison.agreement[0].upper()}{comparison.agreement[1:]}.",
        markdown_table(header, rows),
        "By processor time " + ", ".join(f"{name} is {ratio:.2f} times as fast as the original"
                                         for name, ratio in comparison.ratios.items()) + ".",
        *[operator_table(f"operator of {side.name}", side.operators) for side in comparison.sides if side.operators]])
