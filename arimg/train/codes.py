"""Codes of a data set's pictures under one tokenizer: encoded once and kept in memory-mapped files, or on the fly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arimg.accel.base import token_scales
from arimg.checkpoints import load_component
from arimg.data import to_images
from arimg.devices import find_device
from arimg.errors import ConfigError, InputError
from arimg.tokenizers.vq import VQTokenizer
from arimg.train.caches import CacheFolder
from arimg.train.crops import Crop
from arimg.train.data import CodeSource, Example
from arimg.train.data_config import DataConfig
from arimg.train.sources import CorruptSample, EmojiSource, Source

_UNKNOWN = 65535


def tokenizer_hash(tokenizer: VQTokenizer) -> str:
    """Hexadecimal digest of the weights that decide the codes: encoder, projection, codebook."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        if not key.startswith(("decoder.", "post_quant_conv.")):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_coder(folder: str, device: torch.device | str = "cpu") -> Any:
    """A tokenizer with a codebook, in float32. Raises InputError on any other component, and as load_component."""
    network = load_component(folder, torch.float32, device)
    if not hasattr(network, "encode"):
        raise InputError(f"--tokenizer {folder}: holds the component {type(network).__name__}, which encodes no "
                         "pictures; give a tokenizer's folder")
    if network.space() is None:
        raise InputError(f"--tokenizer {folder}: holds a {type(network).__name__}, whose tokens are numbers and not "
                         "codes; nothing is made ahead for it, so start arimg train")
    return network


class Codes(CodeSource, Protocol):
    """Codes of examples, and the tokenizer they belong to."""

    tokenizer: Any

    def of(self, examples: Sequence[Example]) -> Tensor:
        """codes_BL, int64."""


class CodeCache:
    """Codes (2N, L) uint16 of N images (N, S, S, 3) and of their mirror images: index N+i is image i, left to right.

    An image is encoded the first time it is asked for. The file's name carries the tokenizer's hash, so codes of
    another tokenizer are never read by mistake. Raises ConfigError when the tokenizer has too many codes for 16 bits.
    """

    def __init__(self, folder: Path, images_NHW3: np.ndarray, tokenizer: VQTokenizer, data_hash: str) -> None:
        if tokenizer.vocab_size > _UNKNOWN:
            raise ConfigError(f"tokenizer of {tokenizer.vocab_size} codes: the token cache holds codes below "
                              f"{_UNKNOWN}; give a tokenizer with a smaller codebook")
        self.images = images_NHW3
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.grid = (images_NHW3.shape[1] // tokenizer.stride, images_NHW3.shape[2] // tokenizer.stride)
        path = folder / f"codes-{data_hash}-{tokenizer_hash(tokenizer)}.u16.npy"
        scales = token_scales(tokenizer.space(), self.grid)
        shape = (2 * len(images_NHW3), sum(height * width for height, width in scales))
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".writing.npy")
            np.lib.format.open_memmap(temporary, "w+", np.uint16, shape)[:] = _UNKNOWN
            temporary.rename(path)
        self.codes = np.lib.format.open_memmap(path, "r+")

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3), mirrored where the index is N or more."""
        count = len(self.images)
        pixels = (self.images[i] if i < count else self.images[i - count][:, ::-1] for i in indices)
        return np.stack(list(pixels))

    @torch.no_grad()
    def get(self, indices: np.ndarray) -> Tensor:
        """codes_BL, int64, of images 0 .. N-1 and mirror images N .. 2N-1."""
        missing = np.array([index for index in np.unique(indices) if self.codes[index, 0] == _UNKNOWN], dtype=np.int64)
        if len(missing):
            device = next(self.tokenizer.parameters()).device
            codes_BL = self.tokenizer.encode(to_images(self.pixels(missing)).to(device)).codes_BL.cpu().numpy()
            self.codes[missing, 1:] = codes_BL[:, 1:]
            self.codes[missing, 0] = codes_BL[:, 0]     # last: it tells other readers that the row is complete
        return torch.from_numpy(self.codes[indices].astype(np.int64))


class EmojiCodes:
    """The cache inside an emoji folder; variant 1 of a picture is its mirror image."""

    needs_pixels = False

    def __init__(self, cache: CodeCache) -> None:
        self.cache = cache
        self.tokenizer = cache.tokenizer

    def check(self, index: int) -> None:
        """All are readable."""

    def of(self, examples: Sequence[Example]) -> Tensor:
        """codes_BL, int64."""
        rows = [example.index + len(self.cache.images) * example.variant for example in examples]
        return self.cache.get(np.array(rows))


class ShardCodes:
    """Codes (n, A, L) per group for the A variants of a crop, made ahead by `arimg data codes`. uint16, or uint32 for a
    codebook of more than 65535; the largest number marks a sample that could not be read."""

    needs_pixels = False

    def __init__(self, cache: CacheFolder, tokenizer: VQTokenizer) -> None:
        """Raises ConfigError on a cache that is incomplete or belongs to another tokenizer, source or crop."""
        cache.check_complete()
        self.cache = cache
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.dtype = code_dtype(tokenizer.vocab_size)

    def check(self, index: int) -> None:
        """Raises CorruptSample for a sample that had no codes."""
        group, row = self.cache.place(index)
        if self.cache.load(group)[row, 0, 0] == np.iinfo(self.dtype).max:
            raise CorruptSample(f"{self.cache.groups[group].name}: sample {row} was unreadable when codes were made")

    def of(self, examples: Sequence[Example]) -> Tensor:
        """codes_BL, int64."""
        rows = [(*self.cache.place(example.index), example.variant) for example in examples]
        codes = np.stack([self.cache.load(group)[row, variant] for group, row, variant in rows])
        return torch.from_numpy(codes.astype(np.int64))


class LiveCodes:
    """Codes made on the fly from the pixels, on the accelerator if there is one."""

    needs_pixels = True

    def __init__(self, tokenizer: VQTokenizer) -> None:
        self.tokenizer = tokenizer.eval().requires_grad_(False)

    def check(self, index: int) -> None:
        """Every sample that can be read has codes."""

    @torch.no_grad()
    def encode(self, pixels_BHW3: np.ndarray) -> Tensor:
        """codes_BL, int64, on the CPU."""
        device = find_device("auto")
        return self.tokenizer.to(device).encode(to_images(pixels_BHW3).to(device)).codes_BL.cpu()

    def of(self, examples: Sequence[Example]) -> Tensor:
        """codes_BL of pictures of one size."""
        return self.encode(np.stack([pixels_of(example) for example in examples]))


def code_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds all codes and one number more."""
    return np.uint16 if vocab_size <= _UNKNOWN else np.uint32


def pixels_of(example: Example) -> np.ndarray:
    """uint8 (H, W, 3) of an example that was read with its picture."""
    assert example.pixels_HW3 is not None
    return example.pixels_HW3


def codes_cache(config: DataConfig, crop: Crop, source: Source, tokenizer: VQTokenizer) -> CacheFolder:
    """Where the codes of a source lie and what they depend on."""
    meta = {"kind": "codes", "tokenizer": tokenizer_hash(tokenizer), "vocab_size": tokenizer.vocab_size,
            "crop": crop.tag}
    return CacheFolder(Path(config.cache) / f"codes-{crop.tag}-{source.fingerprint[:8]}", source, meta)


def open_codes(config: DataConfig, crop: Crop, source: Source, tokenizer: VQTokenizer) -> Codes:
    """The emoji folder's own cache, one made ahead, or codes on the fly. Raises ConfigError."""
    if isinstance(source, EmojiSource):
        images = source.emoji.images
        return EmojiCodes(CodeCache(config.path() / "codes", images, tokenizer, source.fingerprint))
    if config.cache:
        return ShardCodes(codes_cache(config, crop, source, tokenizer), tokenizer)
    return LiveCodes(tokenizer)
