"""c(W): what a pass over W positions costs on this machine, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from arimg.accel.target import Target
from arimg.accel.windows import BUCKETS
from arimg.devices import synchronize


@torch.no_grad()
def cost_curve(target: Target, widths: Sequence[int] = BUCKETS, repeats: int = 5) -> dict[int, float]:
    """Median seconds of one pass (`Target.step`, then `Target.draw`) for each width up to L.

    The cache is full, so passes of all widths read the same slots; the widths take turns, so that other work on the
    machine slows all of them alike. Starts the target anew and leaves it fit for nothing but another start.
    """
    length, seeds_B = target.request.length, target.request.seeds_B
    positions_BL = torch.arange(length, device=seeds_B.device).expand(seeds_B.shape[0], -1)
    codes_BL = torch.zeros_like(positions_BL)
    target.start()
    target.step(codes_BL, positions_BL)
    seconds: dict[int, list[float]] = {width: [] for width in widths if width <= length}
    for turn in range(1 + repeats):             # the first turn warms up
        for width, laps in seconds.items():
            synchronize(seeds_B.device)
            began = time.perf_counter()
            target.draw(target.step(codes_BL[:, :width], positions_BL[:, :width]), positions_BL[:, :width])
            synchronize(seeds_B.device)
            if turn:
                laps.append(time.perf_counter() - began)
    return {width: statistics.median(laps) for width, laps in seconds.items()}
