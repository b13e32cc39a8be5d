"""Control maps for training: drawn at random, extracted as published, or read from a cache."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arimg.control.base import build
from arimg.train.caches import CacheFolder
from arimg.train.crops import Crop
from arimg.train.data_config import DataConfig
from arimg.train.maps import random_map
from arimg.train.sources import CorruptSample, Source

KINDS = ("random", "extracted", "cached")


class _Typed:
    """Draws the type of each map with its share."""

    needs_pixels = True

    def __init__(self, types: Sequence[str], shares: np.ndarray) -> None:
        self.types = types
        self.shares = shares

    def draw(self, index: int, variant: int, pixels_HW3: np.ndarray | None,
             rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """(map_HW3 uint8, type id)."""
        type_id = int(rng.choice(len(self.types), p=self.shares))
        return self.map(type_id, index, variant, pixels_HW3, rng), type_id

    def map(self, type_id: int, index: int, variant: int, pixels_HW3: np.ndarray | None,
            rng: np.random.Generator) -> np.ndarray:
        """map_HW3 uint8 of this type."""
        raise NotImplementedError


class RandomMaps(_Typed):
    """Each map differs in thresholds, widths, gaps, colours (maps.py): the model obeys maps made by anyone."""

    def map(self, type_id: int, index: int, variant: int, pixels_HW3: np.ndarray | None,
            rng: np.random.Generator) -> np.ndarray:
        """map_HW3 uint8 of this type."""
        assert pixels_HW3 is not None
        return random_map(self.types[type_id], pixels_HW3, rng)


class ExtractedMaps(_Typed):
    """One extractor per type with its default options, as ControlAR trains. Raises what building an extractor raises,
    a missing weight file above all."""

    def __init__(self, types: Sequence[str], shares: np.ndarray) -> None:
        super().__init__(types, shares)
        self.extractors: list[Any] = [build(name) for name in types]

    def map(self, type_id: int, index: int, variant: int, pixels_HW3: np.ndarray | None,
            rng: np.random.Generator) -> np.ndarray:
        """map_HW3 uint8 of this type."""
        assert pixels_HW3 is not None
        return np.asarray(self.extractors[type_id](Image.fromarray(pixels_HW3)))


class CachedMaps(_Typed):
    """PNG files of every crop, made by `arimg data maps`."""

    needs_pixels = False

    def __init__(self, types: Sequence[str], shares: np.ndarray, caches: Sequence[CacheFolder], variants: int) -> None:
        """Raises ConfigError on a cache that is incomplete or made with something else."""
        super().__init__(types, shares)
        for cache in caches:
            cache.check_complete()
        self.caches = caches
        self.variants = variants

    def map(self, type_id: int, index: int, variant: int, pixels_HW3: np.ndarray | None,
            rng: np.random.Generator) -> np.ndarray:
        """map_HW3 uint8 of this type. Raises CorruptSample."""
        cache = self.caches[type_id]
        group, row = cache.place(index)
        data = cache.load(group)[self.variants * row + variant]
        if not data:
            raise CorruptSample(f"{cache.groups[group].name}: sample {row} was unreadable when maps were made")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def maps_cache(config: DataConfig, crop: Crop, source: Source, name: str) -> CacheFolder:
    """Where the maps of a type lie and what they depend on."""
    meta = {"kind": "maps", "type": name, "crop": crop.tag}
    return CacheFolder(Path(config.cache) / f"maps-{name}-{crop.tag}-{source.fingerprint[:8]}", source, meta)


def as_png(map_image: Image.Image) -> bytes:
    """PNG bytes, of one channel where all three are the same."""
    stream = io.BytesIO()
    pixels_HW3 = np.asarray(map_image)
    grey = bool((pixels_HW3 == pixels_HW3[..., :1]).all())
    map_image.convert("L" if grey else "RGB").save(stream, "png")
    return stream.getvalue()
