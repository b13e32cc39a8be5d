"""The token cache: codes of a data set's images under one tokenizer, encoded once, kept in a memory-mapped file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arimg.tokenizers.vq import VQTokenizer
from arimg.train.data import to_images

_UNKNOWN = -1


def tokenizer_hash(tokenizer: VQTokenizer) -> str:
    """Hexadecimal digest of the weights that decide the codes: encoder, projection, codebook."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        if not key.startswith(("decoder.", "post_quant_conv.")):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class CodeCache:
    """Codes (N, L) int32 of images (N, S, S, 3); an image is encoded the first time it is asked for.

    The file's name carries the tokenizer's hash, so codes of another tokenizer are never read by mistake.
    """

    def __init__(self, folder: Path, images_NHW3: np.ndarray, tokenizer: VQTokenizer, data_hash: str) -> None:
        self.images = images_NHW3
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.grid = (images_NHW3.shape[1] // tokenizer.stride, images_NHW3.shape[2] // tokenizer.stride)
        path = folder / f"codes-{data_hash}-{tokenizer_hash(tokenizer)}.npy"
        shape = (len(images_NHW3), self.grid[0] * self.grid[1])
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".writing.npy")
            np.lib.format.open_memmap(temporary, "w+", np.int32, shape)[:] = _UNKNOWN
            temporary.rename(path)
        self.codes = np.lib.format.open_memmap(path, "r+")

    @torch.no_grad()
    def get(self, indices: np.ndarray) -> Tensor:
        """codes_BL, int64."""
        missing = np.array([index for index in np.unique(indices) if self.codes[index, 0] == _UNKNOWN], dtype=np.int64)
        if len(missing):
            device = next(self.tokenizer.parameters()).device
            encoded = self.tokenizer.encode(to_images(self.images[missing]).to(device))
            self.codes[missing] = encoded.codes_BL.cpu().numpy()
        return torch.from_numpy(self.codes[indices].astype(np.int64))
