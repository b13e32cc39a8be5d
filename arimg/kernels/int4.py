"""Products with 4-bit weights: what int4.cpp reads. Letters: M rows, N outputs, K inputs, G groups of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64          # inputs that share a scale
TILE = 16           # outputs that lie together
_DEPTH = 8          # inputs whose codes lie together


def register() -> None:
    """Tell torch.compile the shape of the result. Called once, after the build."""
    torch.library.register_fake("arimg::int4_product", _shape)


def pack_int4(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) as the kernel reads them, of uint8 codes 0 .. 15 with w = scale * (code - 8) + zero; N a multiple
    of TILE, K of GROUP.

    codes (N/16, 8K): 64 bytes for each 8 inputs, byte (n, k) with the code of input k in its low and that of input
    k + 4 in its high half. scales (N/16, G, 2, 16), bfloat16: the scales of a tile and group and then the zeros.
    """
    rows, columns = codes_NK.shape
    low, high = codes_NK.view(rows // TILE, TILE, columns // _DEPTH, 2, _DEPTH // 2).unbind(3)
    codes = (low | high << 4).transpose(1, 2).reshape(rows // TILE, -1)
    scales_2tnG = torch.stack([scale_NG, zero_NG]).unflatten(1, (-1, TILE))
    return codes, scales_2tnG.permute(1, 3, 0, 2).bfloat16().contiguous()


def int4_product(x_MK: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(M, N) float32."""
    out_MN: Tensor = torch.ops.arimg.int4_product(x_MK.float().contiguous(), codes, scales)
    return out_MN


def _shape(x_MK: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x_MK.new_empty(len(x_MK), len(codes) * TILE)
