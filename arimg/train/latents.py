"""Moments of a data set's pictures under a continuous tokenizer: encoded once and kept in the emoji folder's cache, or
on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.data import to_images
from arimg.devices import find_device
from arimg.tokenizers.kl import KLTokenizer, Posterior
from arimg.train.codes import pixels_of, tokenizer_hash
from arimg.train.crops import Crop
from arimg.train.data import Example
from arimg.train.data_config import DataConfig
from arimg.train.sources import EmojiSource, Source


class LiveMoments:
    """Moments (B, 2C, h, w) made on the fly, on the accelerator if there is one."""

    needs_pixels = True

    def __init__(self, tokenizer: KLTokenizer) -> None:
        self.tokenizer = tokenizer.eval().requires_grad_(False)

    def check(self, index: int) -> None:
        """Every sample that can be read has moments."""

    @torch.no_grad()
    def encode(self, pixels_BHW3: np.ndarray) -> Tensor:
        """Moments on the CPU."""
        device = find_device("auto")
        return self.tokenizer.to(device).moments(to_images(pixels_BHW3).to(device)).cpu()

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Moments of pictures of one size."""
        return self.encode(np.stack([pixels_of(example) for example in examples]))


class EmojiMoments(LiveMoments):
    """float16 (2N, 2C, h, w) of N images and of their mirror images (variant 1), encoded when first asked for. The
    file's name carries the tokenizer's hash."""

    needs_pixels = False

    def __init__(self, folder: Path, images_NHW3: np.ndarray, tokenizer: Any, data_hash: str) -> None:
        super().__init__(tokenizer)
        self.images = images_NHW3
        path = folder / f"moments-{data_hash}-{tokenizer_hash(tokenizer)}.f16.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary, shape = path.with_suffix(".writing.npy"), self.encode(np.array(images_NHW3[:1])).shape[1:]
            np.lib.format.open_memmap(temporary, "w+", np.float16, (2 * len(images_NHW3), *shape))[:, 0, 0, 0] = np.nan
            temporary.rename(path)
        self.moments = np.lib.format.open_memmap(path, "r+")

    def of(self, examples: Sequence[Example]) -> Tensor:
        """Moments of whole pictures."""
        count = len(self.images)
        rows = np.array([example.index + count * example.variant for example in examples])
        missing = np.unique(rows[np.isnan(self.moments[rows, 0, 0, 0])])
        if len(missing):
            pixels = [self.images[row] if row < count else self.images[row - count][:, ::-1] for row in missing]
            encoded = self.encode(np.stack(pixels)).half().numpy()
            first = encoded[:, 0, 0, 0].copy()
            encoded[:, 0, 0, 0] = np.nan
            self.moments[missing] = encoded
            self.moments[missing, 0, 0, 0] = first      # last: it tells other readers that the row is complete
        return torch.from_numpy(self.moments[rows].astype(np.float32))


def open_moments(config: DataConfig, crop: Crop, source: Source, tokenizer: Any) -> LiveMoments:
    """The emoji folder's own cache, or moments on the fly."""
    if isinstance(source, EmojiSource):
        return EmojiMoments(config.path() / "codes", source.emoji.images, tokenizer, source.fingerprint)
    return LiveMoments(tokenizer)


def tokens_of(moments_BChw: Tensor, noise_BLC: Tensor, tokenizer: KLTokenizer) -> Tensor:
    """Scaled tokens (B, L, C) of the posteriors' samples for standard normal noise of that shape."""
    config = tokenizer.config
    height, width = (side // config.patch_size for side in moments_BChw.shape[2:])
    noise_BChw = F.pixel_shuffle(noise_BLC.mT.unflatten(2, (height, width)), config.patch_size)
    latents_BChw = Posterior.from_moments(moments_BChw).sample(noise_BChw)
    return F.pixel_unshuffle(latents_BChw * config.scale, config.patch_size).flatten(2).mT
