"""3x3 convolutions with a quarter of the products, for painting on a CPU in float32.

F(4x4, 3x3) of Lavin and Gray (2016, arXiv:1509.09308): a 4x4 tile of the output is A^T [(G g G^T) * (B^T d B)] A; d is
the 6x6 tile of the input that it sees and g the kernel, so 36 products per channel pair replace 144. Sums are those
of the direct convolution, up to about 1e-5 of their size. An input that is first doubled in size (nearest neighbour) is
read as it is: a 6x6 tile of the doubled map repeats 4x4 cells, which the input's transform takes in.

Letters: C, K channels in and out; T tiles; Q = 36 products of a tile. Maps are (H, W, C), channels last.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4
CHUNK = 2 ** 18         # numbers of transformed input held at a time: they stay in the processor's cache
LEAST_CHANNELS = 64     # below, the transforms cost more than the products saved
LEAST_CELLS = 32 * 32   # below, reading four times the weights does

_B = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
      (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))                              # B^T
_G = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))                      # 24 G
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))           # A^T
_DOUBLED = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 1, 0), (0, 0, 0, 1))     # 4 cells -> 6


@cache
def _twice(rows: tuple[tuple[float, ...], ...], doubled: bool = False) -> Tensor:
    """The matrix along both axes of a tile, float32."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    if doubled:
        matrix = matrix @ torch.tensor(_DOUBLED, dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with zero padding that `lay_out` prepares for painting; training never does.

    Prepared weights take four times the memory of the others, and are forgotten when those are moved or loaded.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._weight_QCK: Tensor | None = None

    @torch.no_grad()
    def lay_out(self) -> None:
        """Transform the weights, if they lie on a CPU in float32 and are many enough."""
        weight = self.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and min(weight.shape[:2]) >= LEAST_CHANNELS:
            half = torch.tensor(_G, dtype=torch.float64).float() / 24
            self._weight_QCK = torch.einsum("ia,kcab,jb->ijck", half, weight, half).flatten(0, 1).contiguous()

    def paint(self, x_BCHW: Tensor, norm: nn.GroupNorm | None = None, double: bool = False,
              plus_BKHW: Tensor | None = None) -> Tensor:
        """plus + conv(x), where x goes through silu(norm(x)) or is doubled in size before."""
        height, width = ((1 + double) * side for side in x_BCHW.shape[2:])
        if (self._weight_QCK is None or torch.is_grad_enabled() or height % TILE or width % TILE
                or height * width < LEAST_CELLS):
            return self._plain(x_BCHW, norm, double, plus_BKHW)
        out_BHWK = x_BCHW.new_empty(len(x_BCHW), height, width, self.out_channels)
        for index, x_CHW in enumerate(x_BCHW):
            x_HWC = x_CHW.permute(1, 2, 0).contiguous()
            plus_HWK = None if plus_BKHW is None else plus_BKHW[index].permute(1, 2, 0)
            self._paint(x_HWC, out_BHWK[index], None if norm is None else _affine(norm, x_HWC), double, plus_HWK)
        return out_BHWK.permute(0, 3, 1, 2)

    def _plain(self, x_BCHW: Tensor, norm: nn.GroupNorm | None, double: bool, plus_BKHW: Tensor | None) -> Tensor:
        x_BCHW = x_BCHW if norm is None else F.silu(norm(x_BCHW))
        out_BKHW = self(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest") if double else x_BCHW)
        return out_BKHW if plus_BKHW is None else out_BKHW + plus_BKHW

    def _paint(self, x_HWC: Tensor, out_HWK: Tensor, affine: tuple[Tensor, Tensor] | None, double: bool,
               plus_HWK: Tensor | None) -> None:
        """One image, some rows of tiles at a time."""
        assert self._weight_QCK is not None and self.bias is not None
        height, width, channels = out_HWK.shape
        down, across = height // TILE, width // TILE        # tiles
        stride = TILE // (1 + double)                       # cells of the input from one tile to the next
        matrix = _twice(_B, double)
        rows = max(1, CHUNK // (36 * across * max(x_HWC.shape[2], channels)))
        for first in range(0, down, rows):
            count = min(rows, down - first)
            cells = _slab(x_HWC, first * stride - 1, (first + count) * stride + 1, affine)
            side = stride + 2
            tiles = cells.as_strided((side, side, count, across, cells.shape[2]),
                                     (cells.stride(0), cells.stride(1), stride * cells.stride(0),
                                      stride * cells.stride(1), 1))
            turned_QTC = (matrix @ tiles.reshape(side * side, -1)).view(36, count * across, -1)
            products_QTK = torch.bmm(turned_QTC, self._weight_QCK)
            tiles = (_twice(_A) @ products_QTK.flatten(1)).view(TILE, TILE, count, across, channels)
            lines = slice(TILE * first, TILE * (first + count))
            out = torch.add(tiles.permute(2, 0, 3, 1, 4), self.bias,
                            out=out_HWK[lines].view(count, TILE, across, TILE, channels))
            if plus_HWK is not None:
                out.view(-1, width, channels).add_(plus_HWK[lines])

    def _apply(self, fn: Any, recurse: bool = True) -> "Conv3x3":
        self._weight_QCK = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._weight_QCK = None
        super()._load_from_state_dict(*args, **kwargs)


def _slab(x_HWC: Tensor, first: int, stop: int, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows first .. stop-1 after silu(scale x + shift), with a border of zeros."""
    height, width, channels = x_HWC.shape
    slab = x_HWC.new_zeros(stop - first, width + 2, channels)
    inside = slab[max(0, -first):min(stop, height) - first, 1:-1]
    rows = x_HWC[max(0, first):stop]
    if affine is None:
        inside.copy_(rows)
    else:
        F.silu(torch.addcmul(affine[1], rows, affine[0], out=inside), inplace=True)
    return slab


def _affine(norm: nn.GroupNorm, x_HWC: Tensor) -> tuple[Tensor, Tensor]:
    """scale_C and shift_C of the group norm of one image."""
    groups = norm.num_groups
    x_NC = x_HWC.flatten(0, 1)
    mean_G = x_NC.mean(0).view(groups, -1).mean(1)
    mean_C = mean_G.repeat_interleave(x_NC.shape[1] // groups)
    square_C = sum(((part - mean_C).square_().sum(0) for part in x_NC.split(4096)), x_NC.new_zeros(x_NC.shape[1]))
    variance_G = square_C.view(groups, -1).mean(1) / len(x_NC)
    scale_C = (variance_G + norm.eps).rsqrt().repeat_interleave(x_NC.shape[1] // groups) * norm.weight
    return scale_C, norm.bias - mean_C * scale_C
