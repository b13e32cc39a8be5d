"""A whole picture, codes and then pixels, side by side with the original: our networks as they are, quantised and
exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arimg.bench.machine import ReadClock, describe
from arimg.bench.original import ARPair, VQPair
from arimg.bench.side_by_side import (CPU, OURS, THEIRS, Comparison, Phases, Side, compare, compiled_pair, dtype_of,
                                      precisions, quantised_pairs)
from arimg.checkpoints import load_component
from arimg.export import export_component

CLASS_ID = 7


def exported_sides(codes: ARPair, pixels: VQPair, runtime: str, folder: Path,
                   formats: Sequence[str] = ("int8",)) -> dict[str, tuple[ARPair, VQPair]]:
    """The networks of both pairs on a runtime, once for each form of the transformer's weights, and the transformer
    with our own tokenizer (`arimg export --keep-tokenizer`). The graphs are written below `folder`, which must last as
    long as the networks."""
    export_component(pixels.ours, runtime, "float32", folder / "tokenizer")
    painter = replace(pixels, ours=load_component(folder / "tokenizer", pixels.dtype))
    sides = {}
    for name in formats:
        export_component(codes.ours, runtime, name, folder / name)
        exported = replace(codes, ours=load_component(folder / name, pixels.dtype))
        sides[f"{runtime} {name}"] = exported, painter
        sides[f"{runtime} {name} + {OURS}"] = exported, pixels
    return sides


def quantised_sides(codes: ARPair, pixels: VQPair, name: str,
                    compiled: bool = False) -> dict[str, tuple[ARPair, VQPair]]:
    """Ours with quantised weights, without extras; `compiled`: and through torch.compile."""
    return {side: (pair, pixels) for side, pair in quantised_pairs(codes, name, compiled).items()}


def compiled_side(codes: ARPair, pixels: VQPair) -> dict[str, tuple[ARPair, VQPair]]:
    """Ours through torch.compile, the weights as they are."""
    return {f"{OURS} compiled": (compiled_pair(codes), pixels)}


@torch.no_grad()
def bench_painting(codes: ARPair, pixels: VQPair, tokens: int, cfg: float, turns: int,
                   others: dict[str, tuple[ARPair, VQPair]]) -> Comparison:
    """One picture of `tokens` codes: the original, ours as it is, and `others`."""
    codes.eval()
    width = int(codes.config.block_size ** 0.5)
    grid = (tokens // width, width)
    runs: dict[str, Phases] = {THEIRS: _phases(partial(codes.their_codes, CLASS_ID, tokens, cfg),
                                               partial(pixels.their_pixels, grid=grid))}
    for name, (own_codes, own_pixels) in {OURS: (codes, pixels), **others}.items():
        runs[name] = _phases(partial(own_codes.our_codes, CLASS_ID, tokens, cfg),
                             partial(own_pixels.our_pixels, grid=grid))
    codes_BL = codes.their_codes(CLASS_ID, tokens, cfg)
    images_B3HW = pixels.their_pixels(codes_BL, grid)
    difference = max(float((images_B3HW - own.our_pixels(codes_BL, grid)).abs().max())
                     for own in [pixels, *(own for _, own in others.values())])
    blocks = sum(weight.numel() for block in codes.ours.layers for weight in block.parameters())
    head = codes.ours.output.weight.numel()
    clock = ReadClock(CPU)
    laps = compare(runs, [clock.measure], turns)
    full = {THEIRS: codes.theirs, OURS: codes.ours, f"{OURS} compiled": codes.ours}
    sides = tuple(Side(name, own, tokens * _read(name, blocks, head, full) / clock.cpu_rate / own["codes"].cpu_seconds,
                       ()) for name, own in laps.items())
    kinds = precisions(dtype_of(codes.theirs), dtype_of(codes.ours))
    return Comparison(
        f"one picture of {tokens} tokens, guidance {cfg:g}, codes and pixels, {kinds}",
        describe(CPU), turns,
        f"{(blocks + head) / 1e6:.0f} M weights read per token; reading 1 GiB, per thread: "
        f"{clock.cpu_rate / 1e9:.1f} GB/s; the share is of the codes' time",
        f"largest difference of a pixel in [-1, 1] for the same codes: {difference:.1e}", sides)


def _phases(draw: Any, paint: Any) -> Phases:
    drawn: list[torch.Tensor] = []

    def codes() -> None:
        drawn[:] = [draw()]
    return {"codes": codes, "pixels": lambda: paint(drawn[0])}


def _read(name: str, blocks: int, head: int, full: dict[str, nn.Module]) -> float:
    """Bytes of weights per token; heads have 8 bits at least."""
    if name in full:
        return float((blocks + head) * dtype_of(full[name]).itemsize)
    form = name.split()[1]
    width = {"fp16": 2.0, "int8": 1.0, "int4": 0.5}.get(form, 4.0)
    return blocks * width + head * max(width, 1.0)
