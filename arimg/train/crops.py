"""From a picture of any size to the pixels that a network reads: centre, ten-crop, random crops, drawn sizes.

A crop is chosen by an integer, the *variant*, so that cached codes, maps made on the fly and pictures in sample grids
are of the same pixels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

from arimg.errors import ConfigError
from arimg.images import center_crop_adm
from arimg.train.data_config import BucketConfig, CropConfig

ENDLESS = 2 ** 31           # variants of a random crop without a cache
SMALLEST = 0.8              # random crops hold at least this share of the shorter side (LlamaGen's tokenizer)


class Crop:
    """The variants of one crop setting.

    center: ADM's centre square, variant 1 its mirror image. ten: LlamaGen's augmentation of cached codes, per ratio the
    corners and the centre of a larger centre square, then their mirror images. random: ADM's random crop (shorter side
    drawn from [S, S / 0.8]), mirrored half of the time. window: a random window of the picture at its own scale.
    """

    def __init__(self, config: CropConfig, flip: bool) -> None:
        self.config = config
        self.flip = flip
        self.endless = config.kind in ("random", "window")

    @property
    def held_out(self) -> int:
        """The variant for validation: always the same, the centre where there is one."""
        return 4 if self.config.kind == "ten" else 0

    @property
    def tag(self) -> str:
        """Names the folder of a cache."""
        config = self.config
        detail = {"ten": "-".join(map(str, config.ratios)), "random": f"{config.count}"}.get(config.kind, "")
        return "-".join(filter(None, [config.kind, str(config.size), detail, "" if self.flip else "unflipped"]))

    def count(self, cached: bool) -> int:
        """Variants to draw from."""
        if self.endless:
            return self.config.count if cached else ENDLESS
        if self.config.kind == "ten":
            return 10 * len(self.config.ratios)
        return 2 if self.flip else 1

    def __call__(self, image: Image.Image, index: int, variant: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 (h, w, 3) of picture number `index`; `size` = (h, w) is square but for random crops."""
        rng = np.random.default_rng([11, index, variant])
        mirrored = bool(self.flip and rng.random() < 0.5)
        if self.config.kind == "center":
            square, mirrored = center_crop_adm(image, size[0]), variant == 1
        elif self.config.kind == "ten":
            square, mirrored = ten_crop(image, size[0], self.config.ratios[variant // 10], variant % 10), False
        elif self.config.kind == "window":
            square = _window(image, size, rng)
        else:
            square = random_crop(image, size, rng)
        return np.asarray(ImageOps.mirror(square) if mirrored else square)


def ten_crop(image: Image.Image, size: int, ratio: float, variant: int) -> Image.Image:
    """Crop number `variant` of ten: upper left, upper right, lower left, lower right, centre; then mirrored."""
    side = int(size * ratio)
    image = center_crop_adm(image, side)
    place, mirrored = variant % 5, variant >= 5
    if mirrored:
        image = ImageOps.mirror(image)
    middle = round((side - size) / 2)
    left, top = [(0, 0), (side - size, 0), (0, side - size), (side - size, side - size), (middle, middle)][place]
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random window after scaling the picture so that the window covers at least SMALLEST of what would fit."""
    image = cover(image, size, rng.uniform(1, 1 / SMALLEST))
    return _window(image, size, rng)


def cover(image: Image.Image, size: tuple[int, int], slack: float) -> Image.Image:
    """Scaled to cover `slack` times `size` = (h, w): box halvings while twice too large, then bicubic (ADM's way)."""
    height, width = (math.ceil(side * slack) for side in size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image.resize(scaled, Image.Resampling.BICUBIC)


def _window(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    height, width = size
    if image.height < height or image.width < width:
        raise ConfigError(f"data.crop: a window of {height}x{width} does not fit a picture of {image.height}x"
                          f"{image.width}; use data.crop.kind=random, which scales pictures")
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def bucket_sizes(config: BucketConfig, stride: int) -> list[tuple[int, int]]:
    """All (height, width) within the bounds. Raises ConfigError when there is none, or one that no grid fits.

    ControlAR (section 3.4): sides of 384 to 1024 pixels in steps of 16 whose PRODUCT stays within 2304 tokens.
    """
    if config.step % stride:
        raise ConfigError(f"data.buckets.step={config.step}: must be a multiple of the tokenizer's {stride} pixels per "
                          "token")
    sides = range(config.min_side, config.max_side + 1, config.step)
    sizes = [(height, width) for height in sides for width in sides
             if (height // stride) * (width // stride) <= config.max_tokens]
    if not sizes:
        raise ConfigError(f"data.buckets.max_tokens={config.max_tokens}: even {config.min_side}x{config.min_side} "
                          f"pixels make {(config.min_side // stride) ** 2} tokens; raise it or lower min_side")
    return sizes
