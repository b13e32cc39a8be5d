"""3x3 convolutions for painting on a CPU: in float32 with a quarter to a fifth of the products, in bfloat16 directly,
with weights in the order of oneDNN's kernels.

F(m x m, 3x3) of Lavin and Gray (2016, arXiv:1509.09308): an m x m tile of the output is A^T [(G g G^T) * (B^T d B)] A;
d is the (m+2) x (m+2) tile of the input that it sees and g the kernel, so (m+2)^2 products per channel pair replace
9 m^2. Sums are those of the direct convolution, up to about 1e-5 of their size.

Large maps are given to NNPACK (github.com/Maratyszcza/NNPACK), which torch contains where its maker built it in, and
which has m = 6: 64 products for 324. It keeps as many threads as torch had when it was first called. Small maps have so
many channels that reading transformed weights counts; they take m = 4, 36 products for 144, as matrix products here.

Letters: C, K channels in and out; T tiles; Q = 36 products of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.devices import multiplies_bfloat16

STRIP = 9 * 2 ** 20     # numbers of a map that NNPACK gets at a time; it takes about four times their memory
TILE = 4
LEAST_CHANNELS = 64     # below, the transforms cost more than the products saved
SMALL = 32 * 32         # pixels of a map that this module transforms itself
LEAST_CELLS = 16 * 16   # below, reading four times the weights costs more than the products saved

_B = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
      (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))                              # B^T
_G = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))                      # 24 G
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))           # A^T


@cache
def _twice(rows: tuple[tuple[float, ...], ...]) -> Tensor:
    """The matrix along both axes of a tile, float32."""
    matrix = torch.tensor(rows, dtype=torch.float32)
    return torch.kron(matrix, matrix)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with zero padding that `lay_out` lets paint by fewer products, or under autocast to bfloat16 by
    packed weights; training never does.

    Weights that small maps need take four times the memory of the others, packed ones half of it; they are made for the
    first map that needs them, and forgotten when the others are moved or loaded.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._forget()

    def _forget(self) -> None:
        self._laid_out = False
        self._weight_QCK: Tensor | None = None
        self._packed: Tensor | None = None

    def lay_out(self) -> None:
        """Paint faster, if the weights lie on a CPU in float32 and are many enough."""
        self._forget()
        weight = self.weight
        self._laid_out = (weight.device.type == "cpu" and weight.dtype == torch.float32
                          and min(weight.shape[:2]) >= LEAST_CHANNELS)

    def paint(self, x_BCHW: Tensor, norm: nn.GroupNorm | None = None, double: bool = False,
              plus_BKHW: Tensor | None = None) -> Tensor:
        """plus + conv(x), where x goes through silu(norm(x)) or is doubled in size before."""
        if double:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        convolve = self._way(*x_BCHW.shape[2:])
        if convolve is None:
            out_BKHW = self(x_BCHW if norm is None else F.silu(norm(x_BCHW)))
            return out_BKHW if plus_BKHW is None else out_BKHW + plus_BKHW
        images = []
        for x_1CHW in x_BCHW.split(1):      # one by one, so that none depends on its batch
            images.append(convolve(x_1CHW if norm is None else F.silu(norm(x_1CHW), inplace=True)))
        out_BKHW = images[0] if len(images) == 1 else torch.cat(images)
        return out_BKHW if plus_BKHW is None else out_BKHW.add_(plus_BKHW)

    def _way(self, height: int, width: int) -> Callable[[Tensor], Tensor] | None:
        """What convolves maps of this size; None for the direct convolution."""
        if not self._laid_out or torch.is_grad_enabled():
            return None
        if torch.is_autocast_enabled("cpu"):
            fits = torch.get_autocast_dtype("cpu") == torch.bfloat16 and multiplies_bfloat16(self.weight.device)
            return self._by_packed_weight if fits else None
        if height * width > SMALL:
            return self._by_nnpack if torch.backends.nnpack.is_available() else None
        fits = height % TILE == 0 and width % TILE == 0 and height * width >= LEAST_CELLS
        return self._by_tiles if fits else None

    def _by_packed_weight(self, x_1CHW: Tensor) -> Tensor:
        """In bfloat16, channels last: what autocast computes, without casting and ordering the weights each time."""
        ones = [1, 1]
        if self._packed is None:
            weight = self.weight.detach().bfloat16()
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(weight, ones, ones, ones, 1, None)
        bias = None if self.bias is None else self.bias.bfloat16()
        x_1CHW = x_1CHW.bfloat16()
        out_1KHW: Tensor = torch.ops.mkldnn._convolution_pointwise(x_1CHW, self._packed, bias, ones, ones, ones, 1,
                                                                   "none", [], "")
        return out_1KHW

    def _by_nnpack(self, x_1CHW: Tensor) -> Tensor:
        """Some rows at a time if the map is large."""
        def convolve(seen: Tensor, border: int) -> Tensor:
            return torch._nnpack_spatial_convolution(seen, self.weight, self.bias, [border, 1], [1, 1])
        channels, height, width = x_1CHW.shape[1:]
        rows = max(1, STRIP // (6 * width * max(channels, self.out_channels))) * 6
        if height <= rows:
            return convolve(x_1CHW, 1)
        padded = F.pad(x_1CHW, (0, 0, 1, 1))
        return torch.cat([convolve(padded[:, :, row:row + rows + 2], 0) for row in range(0, height, rows)], 2)

    def _by_tiles(self, x_1CHW: Tensor) -> Tensor:
        """The whole map at a time."""
        channels, height, width = x_1CHW.shape[1:]
        down, across, side = height // TILE, width // TILE, TILE + 2
        x_HWC = F.pad(x_1CHW[0].permute(1, 2, 0).contiguous(), (0, 0, 1, 1, 1, 1))
        tiles_SShwC = x_HWC.unfold(0, side, TILE).unfold(1, side, TILE).permute(3, 4, 0, 1, 2)
        tiles = tiles_SShwC.reshape(side * side, -1)
        turned_QTC = (_twice(_B) @ tiles).view(side * side, down * across, channels)
        products_QTK = turned_QTC @ self._transformed()
        out = (_twice(_A) @ products_QTK.flatten(1)).view(TILE, TILE, down, across, self.out_channels)
        out_1KHW = out.permute(4, 2, 0, 3, 1).reshape(1, self.out_channels, height, width)
        return out_1KHW if self.bias is None else out_1KHW.add_(self.bias[:, None, None])

    def _transformed(self) -> Tensor:
        if self._weight_QCK is None:
            cells = self.weight.permute(2, 3, 1, 0).reshape(9, -1)
            self._weight_QCK = (_twice(_G) / 24 ** 2 @ cells).view(-1, self.in_channels, self.out_channels)
        return self._weight_QCK

    def _apply(self, fn: Any, recurse: bool = True) -> "Conv3x3":
        self._forget()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}        # copies of it have no storage

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)
