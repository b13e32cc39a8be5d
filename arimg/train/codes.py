"""The token cache: codes of a data set's images under one tokenizer, encoded once, kept in a memory-mapped file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arimg.data import to_images
from arimg.errors import ConfigError
from arimg.tokenizers.vq import VQTokenizer

_UNKNOWN = 65535


def tokenizer_hash(tokenizer: VQTokenizer) -> str:
    """Hexadecimal digest of the weights that decide the codes: encoder, projection, codebook."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        if not key.startswith(("decoder.", "post_quant_conv.")):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        shape = (2 * len(images_NHW3), self.grid[0] * self.grid[1])
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
