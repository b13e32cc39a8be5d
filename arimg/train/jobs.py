"""Extraction ahead of training, as many processes as there are: codes, maps and caption features per group of a source.

`--shard K/N` takes every N-th group, from the K-th on; a group's file is written whole or not at all, and one that is
there is not made again. So the same command line goes on after any interruption, and no part needs to know of another.
Under torchrun or accelerate launch every process takes a part of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from arimg.control.base import build
from arimg.errors import ConfigError, InputError
from arimg.images import replacing
from arimg.train.ar import ARRun
from arimg.train.caches import CacheFolder, write_records
from arimg.train.captions import FORMS, captions_cache, encoded, first_sentence, load_encoder
from arimg.train.codes import LiveCodes, code_dtype, codes_cache, load_coder
from arimg.train.crops import Crop
from arimg.train.data import processes
from arimg.train.map_sources import as_png, maps_cache
from arimg.train.sources import CorruptSample, Source, log, open_splits

T = TypeVar("T")

_AT_ONCE = 64           # crops or captions per pass of a network


@dataclass(frozen=True)
class Part:
    """Number `index` (from 0) of `count` equal parts of a job."""

    index: int = 0
    count: int = 1

    @staticmethod
    def parse(text: str) -> "Part":
        """Of "K/N", K from 1. Raises InputError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shard {text}: give K/N with K from 1 to N, for example 1/8 to 8/8")
        return Part(int(match[1]) - 1, int(match[2]))

    @staticmethod
    def of_process() -> "Part":
        """That of this process among those that torchrun or accelerate launch has started; alone: everything."""
        return Part(int(os.environ.get("RANK", 0)), processes())


class Job:
    """What is made of every sample of a run's sources, one file per group."""

    def __init__(self, config: ARRun) -> None:
        """Raises ConfigError when the run reads no codes, or has no cache to fill."""
        if not isinstance(config, ARRun):
            raise ConfigError(f"objective={config.objective}: its runs read nothing that is made ahead; give the file "
                              "of a run on codes, such as objective: ar or control")
        if config.data.source == "emoji" or not config.data.cache:
            raise ConfigError(f"data.source={config.data.source}, data.cache={config.data.cache!r}: caches are for "
                              "folder and shards; name the folder that receives this one, data.cache=FOLDER")
        self.config = config
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.crop = Crop(config.data.crop, config.flip)
        self.size = (config.data.crop.size, config.data.crop.size)
        train, held_out = open_splits(config.data)
        self.sources = [train.source, *[held_out.source] * (held_out.source is not train.source)]
        self.variants = self.crop.count(cached=True)
        self.pool = ThreadPoolExecutor(config.data.workers)
        self.skipped = 0

    def cache(self, source: Source) -> CacheFolder:
        """The folder for a source."""
        raise NotImplementedError

    def write(self, cache: CacheFolder, number: int, source: Source, rows: range) -> None:
        """Write the file of group `number`, samples `rows` of the source."""
        raise NotImplementedError

    def run(self, part: Part, progress: Callable[[int], None] = lambda samples: None) -> list[CacheFolder]:
        """Write the files of this part that are missing; returns the folders."""
        caches = [self.cache(source) for source in self.sources]
        work = [(cache, source, number) for cache, source in zip(caches, self.sources)
                for number in range(len(source.groups))]
        for cache in caches:
            cache.claim()
        for cache, source, number in work[part.index::part.count]:
            first, group = int(cache.starts[number]), source.groups[number]
            if not cache.path(group).exists():
                self.write(cache, number, source, range(first, first + group.size))
            progress(group.size)
        return caches

    def samples(self, read: Callable[[int], T], rows: range) -> Iterator[list[T | None]]:
        """read(row) of all rows in order, in blocks that make about _AT_ONCE crops; None for a sample that cannot be
        read, which is named."""
        block = max(1, _AT_ONCE // self.variants)
        for start in range(0, len(rows), block):
            yield list(self.pool.map(lambda row: self._or_none(read, row), rows[start:start + block]))

    def _or_none(self, read: Callable[[int], T], row: int) -> T | None:
        try:
            return read(row)
        except CorruptSample as error:
            self.skipped += 1
            log.warning("sample skipped (%d so far): %s", self.skipped, error)
            return None

    def crops(self, source: Source, row: int) -> np.ndarray:
        """uint8 (A, S, S, 3): all variants of a picture. Raises CorruptSample."""
        image = source.image(row)
        return np.stack([self.crop(image, row, variant, self.size) for variant in range(self.variants)])


class CodesJob(Job):
    """Codes of all crops."""

    def __init__(self, config: ARRun) -> None:
        super().__init__(config)
        self.live = LiveCodes(load_coder(config.tokenizer))

    def cache(self, source: Source) -> CacheFolder:
        return codes_cache(self.config.data, self.crop, source, self.live.tokenizer)

    def write(self, cache: CacheFolder, number: int, source: Source, rows: range) -> None:
        dtype, first = code_dtype(self.live.tokenizer.vocab_size), rows.start
        codes = None
        for block in self.samples(lambda row: (row, self.crops(source, row)), rows):
            found = [item for item in block if item is not None]
            if not found:
                continue
            codes_BL = self.live.encode(np.concatenate([crops_ASS3 for _, crops_ASS3 in found])).numpy()
            if codes is None:
                codes = np.full((len(rows), self.variants, codes_BL.shape[1]), np.iinfo(dtype).max, dtype)
            codes[[row - first for row, _ in found]] = codes_BL.reshape(len(found), self.variants, -1)
        if codes is None:
            codes = np.full((len(rows), self.variants, 1), np.iinfo(dtype).max, dtype)
        with replacing(cache.path(source.groups[number])) as stream:
            np.save(stream, codes)


class MapsJob(Job):
    """Control maps of one type of all crops, as PNG."""

    def __init__(self, config: ARRun, name: str) -> None:
        super().__init__(config)
        self.name = name
        self.extractor: Any = build(name)

    def cache(self, source: Source) -> CacheFolder:
        return maps_cache(self.config.data, self.crop, source, self.name)

    def write(self, cache: CacheFolder, number: int, source: Source, rows: range) -> None:
        blocks = self.samples(lambda row: [as_png(self.extractor(Image.fromarray(crop)))
                                           for crop in self.crops(source, row)], rows)
        unread = [b""] * self.variants
        write_records(cache.path(source.groups[number]),
                      [png for block in blocks for pngs in block for png in pngs or unread])


class CaptionsJob(Job):
    """Text features of all captions and of their first sentences."""

    def __init__(self, config: ARRun) -> None:
        super().__init__(config)
        self.encoder = load_encoder(config.text_encoder)

    def cache(self, source: Source) -> CacheFolder:
        return captions_cache(self.config.data, source, self.config.model.caption_length,
                              self.config.model.caption_dim)

    def write(self, cache: CacheFolder, number: int, source: Source, rows: range) -> None:
        captions = [caption or "" for block in self.samples(source.caption, rows) for caption in block]
        forms = [form for caption in captions for form in (caption, first_sentence(caption))]
        features = [record for start in range(0, len(forms), _AT_ONCE)
                    for record in self._encode(forms[start:start + _AT_ONCE])]
        assert len(features) == FORMS * len(rows)
        write_records(cache.path(source.groups[number]), features)

    def _encode(self, forms: Sequence[str]) -> list[bytes]:
        """Features; nothing for no caption."""
        records = encoded(self.encoder, forms, self.config.model.caption_length)
        return [record if form else b"" for form, record in zip(forms, records)]
