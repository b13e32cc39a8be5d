"""Coloured rectangles, 32 x 32 pixels, two colours to a class, and tokenizers that are computed instead of trained: a
token is a 4 x 4 patch in the principal components of all patches, its codebook the patches that occur (one scale) or
the k-means of what coarser scales leave over (a pyramid). 8 x 8 tokens, at most 64 codes.

All tokens of a rectangle share a colour that neither class nor control tells: independent tokens cannot paint one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.data import to_images
from arimg.tokenizers.base import Encoded
from arimg.tokenizers.multiscale import MultiscaleSpace, Scales
from arimg.tokenizers.vq import VQSpace
from arimg.train.emoji import FORMAT

SIZE, PATCH, CHANNELS, CODES = 32, 4, 8, 64
GRID = (SIZE // PATCH, SIZE // PATCH)
PYRAMID = ((1, 1), GRID)
COLOURS = np.array([[[200, 30, 30], [20, 130, 40]], [[40, 60, 210], [220, 140, 0]]], dtype=np.uint8)     # by class


def shapes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels_NHW3 uint8, class ids). Sides and places are even numbers; all begin in the first two rows of tokens."""
    rng = np.random.default_rng(seed)
    pixels, classes = np.full((count, SIZE, SIZE, 3), 255, dtype=np.uint8), np.arange(count) % 2
    for picture, class_id in zip(pixels, classes):
        height, width = 2 * rng.integers(5, 11, 2)
        top, left = 2 * rng.integers(1, 4), 2 * rng.integers(1, (SIZE - width) // 2)
        picture[top:top + height, left:left + width] = COLOURS[class_id, rng.integers(2)]
    return pixels, classes


def write_shapes(folder: Path, count: int = 480) -> Path:
    """An emoji folder of rectangles, every eighth held out."""
    pixels, classes = shapes(count, seed=0)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", pixels)
    items = [{"class_id": int(class_id), "split": "held_out" if i % 8 == 7 else "train", "name": f"shape-{i}"}
             for i, class_id in enumerate(classes)]
    index = {"format": FORMAT, "size": SIZE, "class_names": ["toy/warm", "toy/cold"], "items": items}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class PatchConfig:
    """Number of codes; scales, none for a raster."""

    codebook_size: int
    scales: Scales = ()


class PatchTokenizer(nn.Module):
    """Patches in principal components. `fit` computes it."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.config = config
        self.stride, self.vocab_size = PATCH, config.codebook_size
        for name, shape in (("basis", (3 * PATCH ** 2, CHANNELS)), ("mean", (3 * PATCH ** 2,)), ("spread", (1,)),
                            ("codebook", (config.codebook_size, CHANNELS))):
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    @classmethod
    def fit(cls, pixels_NHW3: np.ndarray, scales: Scales = ()) -> PatchTokenizer:
        """Of these pictures."""
        patches_NP = F.unfold(to_images(pixels_NHW3), PATCH, stride=PATCH).mT.flatten(0, 1).unique(dim=0)
        tokenizer = cls(PatchConfig(CODES if scales else len(patches_NP), scales))
        with torch.no_grad():
            tokenizer.mean.copy_(patches_NP.mean(0))
            tokenizer.basis.copy_(torch.linalg.svd(patches_NP - tokenizer.mean)[2][:CHANNELS].T)
            tokenizer.spread.copy_(((patches_NP - tokenizer.mean) @ tokenizer.basis).std())
            latents_NC = (patches_NP - tokenizer.mean) @ tokenizer.basis / tokenizer.spread
            tokenizer.codebook.copy_(latents_NC if not scales else tokenizer.residual_codes(pixels_NHW3))
        return tokenizer.eval()

    def residual_codes(self, pixels_NHW3: np.ndarray, rounds: int = 6) -> Tensor:
        """k-means of the residuals of all scales, which change with the codes: a few rounds of both."""
        f_BChw, random = self.latents(to_images(pixels_NHW3)), torch.Generator().manual_seed(0)
        codebook_VC = torch.empty(0)
        for _ in range(rounds):
            space = MultiscaleSpace(codebook_VC, self.config.scales, (nn.Identity(),) * len(self.config.scales))
            rest_BChw, cells = f_BChw, []
            for k in range(len(self.config.scales)):
                cells.append(space.next_input(rest_BChw, k))
                coded = codebook_VC[space.nearest(cells[-1])] if len(codebook_VC) else cells[-1]
                rest_BChw = rest_BChw - space.enlarged(coded, k)
            points_NC = torch.cat([one.flatten(0, 1) for one in cells])
            codebook_VC = k_means(points_NC, codebook_VC, random)
        return codebook_VC

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """(B, C, h, w)."""
        patches_BLP = F.unfold(images_B3HW, PATCH, stride=PATCH).mT
        return ((patches_BLP - self.mean) @ self.basis / self.spread).mT.unflatten(2, GRID)

    def space(self) -> VQSpace | MultiscaleSpace:
        """Raster or pyramid."""
        codebook_VC, scales = self.codebook.detach(), self.config.scales
        return MultiscaleSpace(codebook_VC, scales, (nn.Identity(),) * len(scales)) if scales else VQSpace(codebook_VC)

    def encode(self, images_B3HW: Tensor) -> Encoded:
        """Codes of all scales."""
        latents_BChw, space = self.latents(images_B3HW), self.space()
        if isinstance(space, MultiscaleSpace):
            codes_BL, maps = space.quantise(latents_BChw)
            return Encoded(codes_BL, maps[-1], GRID)
        codes_BL = space.nearest(latents_BChw.flatten(2).mT)
        return Encoded(codes_BL, space.codebook_VC[codes_BL].mT.unflatten(2, GRID), GRID)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """images_B3HW."""
        patches_BLP = latents_BChw.flatten(2).mT * self.spread @ self.basis.T + self.mean
        return F.fold(patches_BLP.mT, (SIZE, SIZE), PATCH, stride=PATCH)

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3HW."""
        space = self.space()
        vectors_BLC = space.codebook_VC[codes_BL]
        if isinstance(space, MultiscaleSpace):
            return self.decode(space.maps(vectors_BLC)[-1])
        return self.decode(vectors_BLC.mT.unflatten(2, grid))


def k_means(points_NC: Tensor, centres_VC: Tensor, random: torch.Generator, steps: int = 4) -> Tensor:
    """CODES centres, from the given ones or from the farthest points; empty ones move to random points."""
    if not len(centres_VC):
        centres_VC, distance_N = points_NC[:1], torch.full((len(points_NC),), torch.inf)
        while len(centres_VC) < CODES:
            distance_N = distance_N.minimum((points_NC - centres_VC[-1]).square().sum(1))
            centres_VC = torch.cat([centres_VC, points_NC[distance_N.argmax()][None]])
    for _ in range(steps):
        nearest_N = torch.cdist(points_NC, centres_VC).argmin(1)
        counts_V = torch.bincount(nearest_N, minlength=CODES)
        sums_VC = torch.zeros_like(centres_VC).index_add_(0, nearest_N, points_NC)
        chosen_V = torch.randint(len(points_NC), (CODES,), generator=random)
        centres_VC = torch.where(counts_V[:, None] > 0, sums_VC / counts_V[:, None].clamp_min(1), points_NC[chosen_V])
    return centres_VC
