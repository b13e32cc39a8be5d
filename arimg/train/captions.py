"""Caption features for text-conditional training: a frozen text encoder on the fly, or features made ahead.

A feature file holds, per sample, float16 rows of the real caption slots alone, for the whole caption and for its first
sentence (LlamaGen trains with the short caption in a share of the samples).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arimg.devices import find_device, find_dtype
from arimg.errors import ConfigError
from arimg.models.text import TextEncoder
from arimg.train.caches import CacheFolder
from arimg.train.data_config import DataConfig
from arimg.train.sources import CorruptSample, Source

SHORT = 1               # row of the first sentence; 0 = whole caption
FORMS = 2


class Captions(Protocol):
    """Captions of samples."""

    def draw(self, index: int, rng: np.random.Generator) -> Any:
        """What `features` takes, of one sample. Raises CorruptSample."""

    def features(self, drawn: Sequence[Any]) -> Tensor:
        """caption_BPC, left-padded with exact zeros."""


class LiveCaptions:
    """Text of the source through the encoder, on the accelerator if there is one."""

    def __init__(self, source: Source, encoder: TextEncoder, slots: int, short: float) -> None:
        self.source = source
        self.encoder = encoder
        self.slots = slots
        self.short = short

    def draw(self, index: int, rng: np.random.Generator) -> str:
        """A caption, in a share `short` of the draws its first sentence. Raises CorruptSample."""
        caption = self.source.caption(index)
        return first_sentence(caption) if rng.random() < self.short else caption

    def features(self, drawn: Sequence[str]) -> Tensor:
        """caption_BPC on the CPU."""
        caption = self.encoder(drawn, self.slots).caption_BPC
        assert caption is not None
        return caption.float().cpu()


class CachedCaptions:
    """Features made by `arimg data captions`."""

    def __init__(self, cache: CacheFolder, slots: int, channels: int, short: float) -> None:
        """Raises ConfigError on a cache that is incomplete or made with something else."""
        cache.check_complete()
        self.cache = cache
        self.shape = (slots, channels)
        self.short = short

    def draw(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """features_TC of the real slots. Raises CorruptSample."""
        form = SHORT if rng.random() < self.short else 0
        group, row = self.cache.place(index)
        data = self.cache.load(group)[FORMS * row + form]
        if not data:
            raise CorruptSample(f"{self.cache.groups[group].name}: sample {row} had no caption when features were made")
        return np.frombuffer(data, np.float16).reshape(-1, self.shape[1])

    def features(self, drawn: Sequence[np.ndarray]) -> Tensor:
        """caption_BPC."""
        caption_BPC = np.zeros((len(drawn), *self.shape), np.float32)
        for row, features_TC in enumerate(drawn):
            kept_TC = features_TC[-self.shape[0]:]
            caption_BPC[row, self.shape[0] - len(kept_TC):] = kept_TC
        return torch.from_numpy(caption_BPC)


def first_sentence(caption: str) -> str:
    """Up to the first full stop, question or exclamation mark."""
    return re.split(r"(?<=[.!?])\s", caption, maxsplit=1)[0]


def encoded(encoder: TextEncoder, captions: Sequence[str], slots: int) -> list[bytes]:
    """The records of captions: float16 features of their real slots."""
    condition = encoder(captions, slots)
    assert condition.caption_BPC is not None and condition.caption_mask_BP is not None
    rows = zip(condition.caption_BPC.half().cpu().numpy(), condition.caption_mask_BP.cpu().numpy())
    return [features_PC[mask_P].tobytes() for features_PC, mask_P in rows]


def load_encoder(folder: str) -> TextEncoder:
    """A text encoder and its tokenizer from one folder, in the device's own precision. Raises ConfigError and what
    TextEncoder.from_folder raises."""
    if not folder:
        raise ConfigError("text_encoder: is empty; give the folder of a T5 encoder and its tokenizer, or a data.cache "
                          "made with arimg data captions")
    device = find_device("auto")
    return TextEncoder.from_folder(Path(folder), Path(folder), find_dtype("auto", device), device)


def captions_cache(config: DataConfig, source: Source, slots: int, channels: int) -> CacheFolder:
    """Where the features of a source lie and what they depend on."""
    meta = {"kind": "captions", "slots": slots, "channels": channels}
    return CacheFolder(Path(config.cache) / f"captions-{source.fingerprint[:8]}", source, meta)
