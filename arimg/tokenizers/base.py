"""The contract of every tokenizer. Images are (B, 3, H, W) float in [-1, 1]; codes are int64 in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TokenSpace(Protocol):
    """What a decoder may know of a codebook."""

    codebook_VC: Tensor                             # float32, as the model sees it (l2-normalised if so trained)
    scales: tuple[tuple[int, int], ...] | None      # (h, w) per scale, None for a single raster

    def nearest(self, latents_BLC: Tensor) -> Tensor:
        """codes_BL of the nearest entries."""


@dataclass(frozen=True)
class Encoded:
    """An encoded batch."""

    codes_BL: Tensor                # int64
    latents_BChw: Tensor            # quantised, what `decode` reads
    grid: tuple[int, int]           # (h, w)


class Tokenizer(Protocol):
    """Images to codes and back."""

    stride: int                     # pixels per token side
    vocab_size: int                 # V

    def encode(self, images_B3HW: Tensor) -> Encoded:
        """Codes and quantised latents."""

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3HW, unclamped."""

    def space(self) -> TokenSpace:
        """The codebook view for decoders."""
