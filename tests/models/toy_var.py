"""Toy next-scale transformers whose every weight matters, their inputs, and a codebook of several scales."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.models.base import Condition
from arimg.models.var import VARConfig, VARTransformer

SCALES = ((1, 1), (2, 2), (2, 3))
ENDS = (0, *accumulate(height * width for height, width in SCALES))
LENGTH, CHANNELS, CLASSES = ENDS[-1], 6, 5
SIZES: dict[str, Any] = dict(vocab_size=20, codebook_dim=CHANNELS, scales=SCALES, dim=32, layers=3, heads=4,
                             num_classes=CLASSES, inject_layers=(0, 2))


def toy_var(seed: int = 0, **changes: Any) -> VARTransformer:
    """In eval mode; weights N(0, 0.3), so that no path is negligible."""
    model = VARTransformer(VARConfig(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def toy_cells(batch: int, cells: int = LENGTH - ENDS[1], seed: int = 1) -> Tensor:
    """What the slots after the first scale read, (B, N, C)."""
    return torch.randn(batch, cells, CHANNELS, generator=torch.Generator().manual_seed(seed))


def toy_inject(batch: int, length: int = LENGTH, points: int = 2, seed: int = 3) -> Tensor:
    """inject_KBLD."""
    return torch.randn(points, batch, length, SIZES["dim"], generator=torch.Generator().manual_seed(seed))


def toy_classes(batch: int) -> Condition:
    """Classes 0, 1, 2 ..."""
    return Condition(class_ids_B=torch.arange(batch) % CLASSES)


@dataclass(frozen=True)
class ToySpace:
    """The map is the sum of all scales, each enlarged to the finest; a scale reads its area means."""

    codebook_VC: Tensor
    scales: tuple[tuple[int, int], ...] = SCALES

    def nearest(self, latents_BLC: Tensor) -> Tensor:
        return torch.cdist(latents_BLC.to(self.codebook_VC.dtype), self.codebook_VC).argmin(-1)

    def accumulate(self, map_BChw: Tensor | None, latents_BWC: Tensor, scale: int) -> Tensor:
        added_BChw = latents_BWC.movedim(1, -1).unflatten(-1, self.scales[scale])
        added_BChw = F.interpolate(added_BChw, self.scales[-1], mode="bilinear")
        return added_BChw if map_BChw is None else map_BChw + added_BChw

    def next_input(self, map_BChw: Tensor, scale: int) -> Tensor:
        return F.adaptive_avg_pool2d(map_BChw, self.scales[scale]).flatten(2).movedim(1, -1)


def toy_space(vocab_size: int = 20, channels: int = CHANNELS, **changes: Any) -> ToySpace:
    generator = torch.Generator().manual_seed(7)
    return ToySpace(torch.randn(vocab_size, channels, generator=generator, dtype=torch.float64), **changes)
