"""A picture of one pixel per token, for progress displays: a colour for each code, linear in its vector.

    preview = Preview.of(pipe.tokenizer)
    pipe(control=image, on_step=lambda info: show(preview(info.codes_BL, (16, 16))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.errors import InputError
from arimg.noise import CounterNoise, Purpose

SIDE = 16               # tokens of a side of the pictures that the map is fitted to
BLOCK = 2               # tokens of a side of equal codes: what stands around a code tints it less than in noise
PICTURES = 4


@dataclass(frozen=True)
class Preview:
    """The colours of all codes, in [-1, 1]."""

    table_V3: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, tokenizer: Any) -> "Preview":
        """Least squares between the vectors of random codes and the mean colours that the tokenizer paints for them; it
        decodes four small pictures. Raises InputError where tokens are continuous or stand on several scales."""
        space = tokenizer.space()
        if space is None or space.scales is not None:
            raise InputError("preview: this tokenizer has no raster of codes; decode its latents instead")
        cells = SIDE // BLOCK
        rows_B = torch.arange(PICTURES, device=space.codebook_VC.device)
        cells_BN = torch.arange(cells * cells, device=rows_B.device).expand(PICTURES, -1)
        words_BN = CounterNoise().words(rows_B, cells_BN, 1, Purpose.DRAFT)[..., 0]
        blocks_Bhw = (words_BN % len(space.codebook_VC)).unflatten(1, (cells, cells))
        codes_BL = blocks_Bhw.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).flatten(1)
        images_B3HW = tokenizer.decode_codes(codes_BL, (SIDE, SIDE)).float().clamp(-1, 1)
        colours_N3 = F.avg_pool2d(images_B3HW, tokenizer.stride).flatten(2).mT.flatten(0, 1)
        vectors_VC = F.pad(space.codebook_VC, (0, 1), value=1.0)
        map_C3 = torch.linalg.lstsq(vectors_VC[codes_BL.flatten()].cpu(), colours_N3.cpu()).solution
        return cls((vectors_VC @ map_C3.to(vectors_VC)).clamp(-1, 1))

    def __call__(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3hw in [-1, 1], one pixel per token of the grid (h, w)."""
        return self.table_V3[codes_BL].mT.unflatten(2, grid)
