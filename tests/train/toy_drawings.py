"""Grey shapes on white, 32 x 32 pixels, and a continuous tokenizer that is computed instead of trained: a token is a
4 x 4 patch in the principal components of all patches. 8 x 8 tokens of 10 numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from arimg.data import to_images
from arimg.train.emoji import FORMAT

SIZE, PATCH, CHANNELS, STD = 32, 4, 10, 0.02
GRID = (SIZE // PATCH, SIZE // PATCH)
KINDS = ("ellipse", "rectangle", "triangle")


def drawing(rng: np.random.Generator, kind: str) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: one shape of one grey."""
    picture = Image.new("L", (SIZE, SIZE), 255)
    draw, grey = ImageDraw.Draw(picture), int(rng.integers(0, 120))
    width, height = (int(side) for side in rng.integers(10, 23, 2))
    left, top = int(rng.integers(2, SIZE - 2 - width)), int(rng.integers(2, SIZE - 2 - height))
    if kind == "triangle":
        tip = left + int(rng.integers(0, width))
        draw.polygon([(left, top + height), (left + width, top + height), (tip, top)], fill=grey)
    else:
        getattr(draw, kind)((left, top, left + width, top + height), fill=grey)
    return np.asarray(picture.convert("RGB"))


def write_drawings(folder: Path, train: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """An emoji folder, class = kind; (pictures of training, pictures held out)."""
    rng, count = np.random.default_rng(0), train + held_out
    images = np.stack([drawing(rng, KINDS[i % len(KINDS)]) for i in range(count)])
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)
    items = [{"class_id": i % len(KINDS), "split": "train" if i < train else "held_out", "name": f"drawing-{i}"}
             for i in range(count)]
    index = {"format": FORMAT, "size": SIZE, "class_names": list(KINDS), "items": items}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return images[:train], images[train:]


@dataclass(frozen=True)
class PrincipalConfig:
    """What training asks of a continuous tokenizer."""

    patch_size: int = 1         # latents per token side: the patches of pixels are latents already
    scale: float = 1.0


class PrincipalTokenizer(nn.Module):
    """Grey patches in principal components, with a posterior of deviation STD. `fit` computes it."""

    def __init__(self, config: PrincipalConfig) -> None:
        super().__init__()
        self.config, self.stride, self.token_channels = config, PATCH, CHANNELS
        self.basis = nn.Parameter(torch.zeros(PATCH ** 2, CHANNELS))
        self.spread_C = nn.Parameter(torch.zeros(CHANNELS))
        self.mean = nn.Parameter(torch.zeros(PATCH ** 2))

    @classmethod
    def fit(cls, pixels_NHW3: np.ndarray) -> PrincipalTokenizer:
        """Of these pictures."""
        patches_NP = F.unfold(to_images(pixels_NHW3)[:, :1], PATCH, stride=PATCH).mT.flatten(0, 1)
        tokenizer = cls(PrincipalConfig())
        with torch.no_grad():
            tokenizer.mean.copy_(patches_NP.mean(0))
            tokenizer.basis.copy_(torch.linalg.svd(patches_NP - tokenizer.mean, full_matrices=False)[2][:CHANNELS].T)
            tokenizer.spread_C.copy_(((patches_NP - tokenizer.mean) @ tokenizer.basis).std(0))
        return tokenizer.eval()

    def space(self) -> None:
        """There is no codebook."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """(B, C, h, w)."""
        patches_BLP = F.unfold(images_B3HW[:, :1], PATCH, stride=PATCH).mT
        return ((patches_BLP - self.mean) @ self.basis / self.spread_C).mT.unflatten(2, GRID)

    def moments(self, images_B3HW: Tensor) -> Tensor:
        """(B, 2C, h, w): mean and log-variance."""
        mean_BChw = self.encode(images_B3HW)
        return torch.cat([mean_BChw, torch.full_like(mean_BChw, 2 * float(np.log(STD)))], dim=1)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """images_B3HW."""
        patches_BLP = (latents_BChw.flatten(2).mT * self.spread_C) @ self.basis.T + self.mean
        return F.fold(patches_BLP.mT, (SIZE, SIZE), PATCH, stride=PATCH).expand(-1, 3, -1, -1)
