"""Where `jacobi` and `ar` part in floating point, on the embedded model, and by how little.

    python -m tests.exactness.divergence [--seeds 16] [--dtype float32]

Passes of different widths round differently, so a code may flip where the two best perturbed log-probabilities nearly
tie. Every first difference must be such a tie.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arimg import Pipeline
from arimg.accel.audit import teacher_forced
from arimg.accel.jacobi import Jacobi
from arimg.call import call_options

WINDOWS = (8, 32)
CONTROL = Path(__file__).resolve().parents[2] / "examples" / "canny.png"


@dataclass(frozen=True)
class Divergence:
    """A picture that differs."""

    seed: int
    control: bool
    window: int
    position: int       # of the first difference
    gap: float          # between the two best perturbed log-probabilities there


def divergences(pipe: Pipeline, seeds: int, windows: tuple[int, ...] = WINDOWS) -> list[Divergence]:
    """All pictures with seeds 0 .. seeds-1, with and without control, that a window paints otherwise than `ar`."""
    found = []
    for control in (None, CONTROL):
        options = {"control": control, "control_type": control and "canny", "class_id": 0, "seeds": range(seeds),
                   "output_type": "latent"}
        plain_BL = pipe(decoder="ar", **options).codes
        gaps_BL = None
        for window in windows:
            codes_BL = pipe(decoder=Jacobi(window), **options).codes
            for seed in (codes_BL != plain_BL).any(1).nonzero().flatten().tolist():
                gaps_BL = perturbed_gaps(pipe, options, plain_BL) if gaps_BL is None else gaps_BL
                position = int((codes_BL[seed] != plain_BL[seed]).nonzero()[0])
                found.append(Divergence(seed, control is not None, window, position, float(gaps_BL[seed, position])))
    return found


@torch.no_grad()
def perturbed_gaps(pipe: Pipeline, options: dict[str, object], codes_BL: Tensor) -> Tensor:
    """(B, L) gaps of the draws that made codes_BL."""
    request, _ = pipe._request(call_options(options, pipe.settings))
    gaps = []
    for positions_BW, p_BWV in teacher_forced(pipe.transformer, request, codes_BL):
        gumbel_BWV = request.noise.gumbel(request.seeds_B, positions_BW, p_BWV.shape[-1])
        best, second = (p_BWV.log() + gumbel_BWV).topk(2).values.unbind(-1)
        gaps.append(best - second)
    return torch.cat(gaps, dim=1)


def main() -> None:
    """Print the rate."""
    parser = argparse.ArgumentParser(description="Where jacobi and ar part in floating point, on the embedded model.")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained("emoji", dtype=arguments.dtype)
    found = divergences(pipe, arguments.seeds)
    print(f"{len(found)} of {arguments.seeds * 2 * len(WINDOWS)} pictures differ in {arguments.dtype}")
    for one in found:
        print(one)


if __name__ == "__main__":
    main()
