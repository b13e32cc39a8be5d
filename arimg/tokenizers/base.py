"""The contract of every tokenizer. Images are (B, 3, H, W) float in [-1, 1]; codes are int64 in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TokenSpace(Protocol):
    """What a decoder may know of a codebook."""

    @property
    def codebook_VC(self) -> Tensor:
        """The codes as the model sees them (l2-normalised if so trained), float32 at least."""

    @property
    def scales(self) -> tuple[tuple[int, int], ...] | None:
        """(h, w) per scale, None for a single raster."""

    def nearest(self, latents_BLC: Tensor) -> Tensor:
        """codes_BL of the nearest entries."""


class ScaleSpace(TokenSpace, Protocol):
    """A codebook whose tokens stand on several scales, all in one row, coarse to fine. Their vectors, or any others,
    add up to a map (B, C, h, w) of the size of the last scale."""

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """(h, w) per scale."""

    def accumulate(self, map_BChw: Tensor | None, latents_BWC: Tensor, k: int) -> Tensor:
        """The map with the tokens of scale k = 0, 1, ... added; None is the empty map before scale 0."""

    def next_input(self, map_BChw: Tensor, k: int) -> Tensor:
        """cells_BWC that a model reads at scale k >= 1, of the map of all scales before it."""


@dataclass(frozen=True)
class Encoded:
    """An encoded batch."""

    codes_BL: Tensor                # int64, of all scales
    latents_BChw: Tensor            # quantised, what `decode` reads
    grid: tuple[int, int]           # (h, w), of the last scale


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
