"""Products with 4-bit and 8-bit weights: what products.cpp reads. Letters: M rows, N outputs, K inputs, G groups of
inputs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

GROUP = 64          # inputs that share a scale of 4-bit weights
TILE = 16           # outputs that lie together
LINE = 64           # bytes of a tile that lie together: 8 inputs of 4 bits, or 4 inputs of 8


def register() -> None:
    """Tell torch.compile the shape of the result. Called once, after the build."""
    for name in ("int4_product", "int8_product"):
        torch.library.register_fake(f"arimg::{name}", _shape)
    torch.library.register_fake("arimg::kept_product", _shape_kept)


def pack_int4(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) as the kernel reads them, of uint8 codes 0 .. 15 with w = scale * (code - 8) + zero; N a multiple
    of TILE, K of GROUP.

    codes (N/16, 8K): 64 bytes for each 8 inputs, byte (n, k) with the code of input k in its low and that of input
    k + 4 in its high half. scales (N/16, G, 2, 16), bfloat16: the scales of a tile and group and then the zeros.
    """
    rows, columns = codes_NK.shape
    low, high = codes_NK.view(rows // TILE, TILE, columns // 8, 2, 4).unbind(3)
    scales_2tnG = torch.stack([scale_NG, zero_NG]).unflatten(1, (-1, TILE)).bfloat16()
    return _by_tiles((low | high << 4).view(rows, -1)), scales_2tnG.permute(1, 3, 0, 2).contiguous()


def pack_int8(codes_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) as the kernel reads them, of int8 codes -127 .. 127 with w = scale * code; N a multiple of TILE,
    K of 4.

    codes (N/16, 16K): 64 bytes for each 4 inputs, byte (n, k) with 128 + the code of input k. scales (N/16, 16).
    """
    return _by_tiles((codes_NK.short() + 128).to(torch.uint8)), scale_N.float().view(-1, TILE).contiguous()


def _by_tiles(bytes_NX: Tensor) -> Tensor:
    """(N/16, 16X): for each tile, 4 bytes of its first output, 4 of its second, and so on; then the next 4."""
    return bytes_NX.unflatten(1, (-1, LINE // TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).flatten(1)


def int4_product(x_MK: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(M, N) float32."""
    out_MN: Tensor = torch.ops.arimg.int4_product(x_MK.float().contiguous(), codes, scales)
    return out_MN


def int8_product(x_MK: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(M, N) float32."""
    out_MN: Tensor = torch.ops.arimg.int8_product(x_MK.float().contiguous(), codes, scales)
    return out_MN


class KeptWeight:
    """Packed codes and scales, and the product with them. Compiled graphs know them by a number, as handing over a
    hundred tensors takes as long as some of the products; copies of a layer share them."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.weights, self.outputs = (codes, scales), len(codes) * TILE
        self.number: int = torch.ops.arimg.keep_weights(codes, scales)
        weakref.finalize(self, torch.ops.arimg.drop_weights, self.number).atexit = False

    def __call__(self, x_MK: Tensor) -> Tensor:
        """(M, N) float32."""
        out_MN: Tensor = torch.ops.arimg.kept_product(x_MK.float().contiguous(), self.number, self.outputs)
        return out_MN

    def __deepcopy__(self, memo: Any) -> KeptWeight:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptWeight, self.weights         # another process gives them another number


def _shape_kept(x_MK: Tensor, number: int, outputs: int) -> Tensor:
    return x_MK.new_empty(len(x_MK), outputs)


def _shape(x_MK: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x_MK.new_empty(len(x_MK), len(codes) * TILE)
