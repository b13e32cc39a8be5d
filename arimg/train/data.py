"""Batches as functions of (seed, step, micro): any process can make any batch, and a resumed run repeats nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from arimg.errors import ConfigError, InputError
from arimg.train.crops import Crop
from arimg.train.data_config import DataConfig
from arimg.train.order import EpochOrder
from arimg.train.sources import CorruptSample, Split, log

T = TypeVar("T")

_SAMPLE = 3             # purpose of random draws
_PATIENCE = 100         # unreadable samples in a row before a run gives up


def batch_rng(seed: int, step: int, micro: int = 0) -> np.random.Generator:
    """The generator of what is drawn for one micro-batch as a whole."""
    return np.random.default_rng([seed, 2, step, micro])


def balanced_indices(labels_N: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """(batch_size,) indices drawn so that a class of n samples gets a share proportional to sqrt(n)."""
    counts = np.bincount(labels_N)
    weights_N = counts[labels_N] ** -0.5
    return rng.choice(len(labels_N), batch_size, p=weights_N / weights_N.sum())


def processes() -> int:
    """How many processes train together, as torchrun and accelerate launch tell each of them."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Loader:
    """Chooses the samples of a micro-batch and reads them with threads."""

    def __init__(self, config: DataConfig, split: Split, seed: int, lanes: int = 1) -> None:
        """`lanes`: micro-batches per step, see EpochOrder. Raises ConfigError when there are too few samples."""
        self.config = config
        self.split = split
        self.seed = seed
        self.skipped = 0
        self.pool = ThreadPoolExecutor(config.workers, thread_name_prefix="arimg-loader")
        if len(split.indices) < lanes:
            raise ConfigError(f"data.folder={config.folder}: {len(split.indices)} samples for {lanes} micro-batches "
                              "per step; use fewer processes or less accumulation")
        if config.balanced:
            self.labels = np.asarray(split.source.labels())[np.asarray(split.indices)]
            if (self.labels < 0).any():
                raise ConfigError("data.order=balanced: some samples have no class; write data.order=epochs")
        else:
            self.order = EpochOrder(split.group_sizes(), seed, lanes, config.window)

    def indices(self, step: int, micro: int) -> np.ndarray:
        """(batch_size,) numbers of samples in the source."""
        size = self.config.batch_size
        if self.config.balanced:
            chosen = balanced_indices(self.labels, size, batch_rng(self.seed, step, micro))
        else:
            chosen = self.order.lane(micro, step * size, size)
        return np.array([self.split.indices[i] for i in chosen])

    def read(self, indices: Sequence[int] | np.ndarray, one: Callable[[int, np.random.Generator], T], step: int,
             micro: int) -> list[T]:
        """one(index, rng) for each sample, in order; each has a generator of its own, so that the result does not
        depend on the number of threads. Where `one` raises CorruptSample, it is counted, named in the log, and another
        training sample takes its place. Raises InputError when nothing can be read any more."""
        return list(self.pool.map(lambda index, row: self._one(one, int(index), (step, micro, row)),
                                  indices, range(len(indices))))

    def _one(self, one: Callable[[int, np.random.Generator], T], index: int, place: tuple[int, int, int]) -> T:
        for attempt in range(_PATIENCE):
            rng = np.random.default_rng([self.seed, _SAMPLE, *place, attempt])
            try:
                return one(index, rng)
            except CorruptSample as error:
                self.skipped += 1
                log.warning("sample skipped (%d so far): %s", self.skipped, error)
                index = int(self.split.indices[int(rng.integers(len(self.split.indices)))])
        raise InputError(f"data.folder={self.config.folder}: {_PATIENCE} samples in a row cannot be read; check the "
                         "disk, or index the shards again with arimg data index")


class CodeSource(Protocol):
    """Codes of samples: from a cache (codes.py) or of the pixels."""

    needs_pixels: bool

    def check(self, index: int) -> None:
        """Raises CorruptSample for a sample without codes."""


class CaptionSource(Protocol):
    """Captions of samples, as text or as cached features (captions.py)."""

    def draw(self, index: int, rng: np.random.Generator) -> Any:
        """What is collated later. Raises CorruptSample."""


class MapSource(Protocol):
    """Control maps of samples (map_sources.py)."""

    needs_pixels: bool

    def draw(self, index: int, variant: int, pixels_HW3: np.ndarray | None,
             rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """(map_HW3, type id). Raises CorruptSample."""


@dataclass(frozen=True)
class Example:
    """What is read of one sample."""

    index: int
    variant: int                            # of the crop
    pixels_HW3: np.ndarray | None = None
    caption: Any = None
    map_HW3: np.ndarray | None = None
    type_id: int = 0


@dataclass(frozen=True)
class Feed:
    """All that is read of the samples of one split."""

    loader: Loader
    crop: Crop
    codes: CodeSource | None = None
    captions: CaptionSource | None = None
    maps: MapSource | None = None

    @property
    def variants(self) -> int:
        """Crops of a sample to draw from."""
        return self.crop.count(cached=self.codes is not None and not self.codes.needs_pixels)

    def batch(self, step: int, micro: int, size: tuple[int, int]) -> list[Example]:
        """The examples of a micro-batch at `size` = (height, width)."""
        read = partial(self.example, size=size)
        return self.loader.read(self.loader.indices(step, micro), read, step, micro)

    def held_out(self, count: int, size: tuple[int, int]) -> list[Example]:
        """The same `count` samples every time, in an order that the seed decides, and always the same crop."""
        chosen = np.random.default_rng(self.loader.seed).permutation(len(self.loader.split.indices))[:count]
        read = partial(self.example, size=size, variant=self.crop.held_out)
        return self.loader.read([self.loader.split.indices[i] for i in chosen], read, 0, 0)

    def example(self, index: int, rng: np.random.Generator, size: tuple[int, int],
                variant: int | None = None) -> Example:
        """One sample; its picture is decoded only if something needs it. Raises CorruptSample."""
        variant = int(rng.integers(self.variants)) if variant is None else variant
        if self.codes is not None:
            self.codes.check(index)
        users = [part for part in (self.codes, self.maps) if part is not None]
        pixels_HW3 = None
        if not users or any(part.needs_pixels for part in users):
            pixels_HW3 = self.crop(self.loader.split.source.image(index), index, variant, size)
        caption = self.captions.draw(index, rng) if self.captions is not None else None
        if self.maps is None:
            return Example(index, variant, pixels_HW3, caption)
        return Example(index, variant, pixels_HW3, caption, *self.maps.draw(index, variant, pixels_HW3, rng))
