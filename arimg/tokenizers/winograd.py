"""3x3 convolutions with a fifth of the products, for painting on a CPU in float32.

F(m x m, 3x3) of Lavin and Gray (2016, arXiv:1509.09308): an m x m tile of the output is A^T [(G g G^T) * (B^T d B)] A; d
is the (m+2) x (m+2) tile of the input that it sees and g the kernel, so (m+2)^2 products per channel pair replace 9 m^2.
m is 6 (64 products for 324), or 4 (36 for 144) on maps that this covers with fewer products. Sums are those of the
direct convolution, up to about 1e-5 of their size. An input that is first doubled in size (nearest neighbour) is read as
it is: a tile of the doubled map repeats m/2+2 cells along each axis, which the input's transform takes in.

Letters: C, K channels in and out; T tiles; S = m+2, the side of a tile of the input. Maps are (H, W, C), channels last.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILES = (4, 6)          # m; of those that take as few products the first, as it has fewer weights
CHUNK = 2 ** 21         # numbers of transformed input held at a time: they stay in the processor's cache
LEAST_CHANNELS = 64     # below, the transforms cost more than the products saved
LEAST_CELLS = 32 * 32   # below, reading four times the weights does

# Where polynomials are evaluated, beside infinity: Barabasz et al. (2020, arXiv:1803.10986), table 3. `_product` adds
# the bias at the second, 1.
_POINTS = (0, 1, -1, 2, -1 / 2, -2, 1 / 2)


@cache
def _matrices(tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """A^T (m, S), G (S, 3) and B^T (S, S), float64: Toom and Cook's product of polynomials, transposed."""
    points_P = torch.tensor(_POINTS[:tile + 1], dtype=torch.float64)

    def values(terms: int) -> Tensor:
        """Of each power at each point; at infinity the highest."""
        powers = torch.arange(terms)
        return torch.cat([points_P[:, None] ** powers, (powers == terms - 1).double()[None]])
    into = torch.linalg.inv(values(tile + 2)).T
    size = into.abs().amax(1, keepdim=True)         # so that no row of products is much larger than the others
    return values(tile).T, values(3) * size, into / size


@cache
def _input_matrix(tile: int, double: bool) -> Tensor:
    """B^T, float32, of a tile as it lies: (S, S), or (S, m/2+2) if each cell of the input is two of the tile."""
    side = tile + 2
    cells = (torch.arange(side) + 1) // 2 if double else torch.arange(side)
    return (_matrices(tile)[2] @ F.one_hot(cells).double()).float()


@cache
def _output_matrix(tile: int) -> Tensor:
    """A^T, float32."""
    return _matrices(tile)[0].float().contiguous()


def _tile(height: int, width: int) -> int:
    """The m that covers a map with the fewest products."""
    return min(TILES, key=lambda tile: math.ceil(height / tile) * math.ceil(width / tile) * (tile + 2) ** 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with zero padding that `lay_out` lets paint by fewer products; training never does.

    Weights are transformed when a map of a new size comes. They take four or seven times the memory of the others, and
    are forgotten when those are moved or loaded.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._transformed: dict[int, Tensor] | None = None      # m -> (S * S, C, K)

    def lay_out(self) -> None:
        """Paint by fewer products, if the weights lie on a CPU in float32 and are many enough."""
        weight = self.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and min(weight.shape[:2]) >= LEAST_CHANNELS:
            self._transformed = {}

    def _weight(self, tile: int) -> Tensor:
        assert self._transformed is not None
        if tile not in self._transformed:
            half = _matrices(tile)[1].float()
            weight_SSCK = torch.einsum("ia,kcab,jb->ijck", half, self.weight, half)
            self._transformed = {tile: weight_SSCK.flatten(0, 1).contiguous()}
        return self._transformed[tile]

    def paint(self, x_BCHW: Tensor, norm: nn.GroupNorm | None = None, double: bool = False,
              plus_BKHW: Tensor | None = None) -> Tensor:
        """plus + conv(x), where x goes through silu(norm(x)) or is doubled in size before."""
        height, width = ((1 + double) * side for side in x_BCHW.shape[2:])
        if self._transformed is None or torch.is_grad_enabled() or height * width < LEAST_CELLS:
            return self._plain(x_BCHW, norm, double, plus_BKHW)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        out_BHWK = x_BCHW.new_empty(len(x_BCHW), height, width, self.out_channels)
        for index, out_HWK in enumerate(out_BHWK):
            x_1CHW = x_BCHW[index:index + 1]
            x_HWC = (x_1CHW if norm is None else norm(x_1CHW))[0].permute(1, 2, 0)
            plus_HWK = None if plus_BKHW is None else plus_BKHW[index].permute(1, 2, 0)
            self._paint(x_HWC, out_HWK, norm is not None, double, plus_HWK)
        return out_BHWK.permute(0, 3, 1, 2)

    def _plain(self, x_BCHW: Tensor, norm: nn.GroupNorm | None, double: bool, plus_BKHW: Tensor | None) -> Tensor:
        x_BCHW = x_BCHW if norm is None else F.silu(norm(x_BCHW))
        out_BKHW = self(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest") if double else x_BCHW)
        return out_BKHW if plus_BKHW is None else out_BKHW + plus_BKHW

    def _paint(self, x_HWC: Tensor, out_HWK: Tensor, silu: bool, double: bool, plus_HWK: Tensor | None) -> None:
        """One image, some rows of tiles at a time."""
        height, width, most = out_HWK.shape[0], out_HWK.shape[1], max(out_HWK.shape[2], x_HWC.shape[2])
        tile = _tile(height, width)
        down, across = math.ceil(height / tile), math.ceil(width / tile)
        stride, side = tile // (1 + double), tile + 2           # stride: cells of the input from a tile to the next
        chunks = math.ceil(down * across * side ** 2 * most / CHUNK)
        rows = math.ceil(down / min(chunks, down))
        slab = x_HWC.new_zeros(rows * stride + 3, (across + 1) * stride, x_HWC.shape[2])
        size = max((rows * stride + 2) * (across + 1), rows * across * side) * side * most
        pair = x_HWC.new_empty(size), x_HWC.new_empty(size)
        for first in range(0, down, rows):
            count = min(rows, down - first)
            _fill(slab, x_HWC, first * stride - 1, (first + count) * stride + 1, silu)
            turned_TSSC = _turn(slab, _input_matrix(tile, double), stride, count, across, pair)
            tiles_HWTK = self._product(turned_TSSC, tile, pair)
            for row, tiles_HWtK in enumerate(tiles_HWTK.split(across, 2), first):
                lines = slice(tile * row, tile * (row + 1))
                _lay(tiles_HWtK, out_HWK[lines], None if plus_HWK is None else plus_HWK[lines])

    def _product(self, turned_TSSC: Tensor, tile: int, pair: tuple[Tensor, Tensor]) -> Tensor:
        """tiles_HWTK of the output."""
        tiles, side, _, channels = turned_TSSC.shape
        weight, back = self._weight(tile), _output_matrix(tile)
        products = _take(pair[0], side * side, tiles, self.out_channels)
        torch.bmm(turned_TSSC.view(tiles, side * side, channels).transpose(0, 1), weight, out=products)
        if self.bias is not None:
            products[side + 1].add_(self.bias)      # the point (1, 1) goes into every pixel once
        half = _take(pair[1], tile, side, tiles * self.out_channels)
        torch.mm(back, products.view(side, -1), out=half.view(tile, -1))
        out = torch.bmm(back.expand(tile, -1, -1), half, out=_take(pair[0], tile, tile, tiles * self.out_channels))
        return out.view(tile, tile, tiles, -1)

    def _apply(self, fn: Any, recurse: bool = True) -> "Conv3x3":
        self._transformed = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._transformed = None
        super()._load_from_state_dict(*args, **kwargs)


def _take(buffer: Tensor, *shape: int) -> Tensor:
    """The buffer's beginning in a shape."""
    return buffer[:math.prod(shape)].view(shape)


def _fill(slab: Tensor, x_HWC: Tensor, first: int, stop: int, silu: bool) -> None:
    """Rows first .. stop-1 of the map, after silu if asked, into a slab whose first column is a border of zeros."""
    height, width = x_HWC.shape[:2]
    begin, end = max(0, first), min(stop, height)
    slab[end - first:].zero_()
    inside = slab[begin - first:end - first, 1:width + 1]
    if silu:
        torch.ops.aten.silu.out(x_HWC[begin:end], out=inside)
    else:
        inside.copy_(x_HWC[begin:end])


def _turn(slab: Tensor, matrix: Tensor, stride: int, count: int, across: int, pair: tuple[Tensor, Tensor]) -> Tensor:
    """turned_TSSC: the matrix along both axes of the slab's tiles. A tile beyond each row's last is not used."""
    (side, cells), channels = matrix.shape, slab.shape[2]
    lines, pitch = count * stride + 2, across + 1
    half = _take(pair[0], lines * pitch, side, channels)
    torch.bmm(matrix.expand(lines * pitch, -1, -1),
              slab.as_strided((lines * pitch, cells, channels), (stride * channels, channels, 1)), out=half)
    half = half.view(lines, pitch, side * channels)
    turned = _take(pair[1], count, across, side, side * channels)
    for row, out in enumerate(turned):
        below = half[row * stride:row * stride + cells, :across].transpose(0, 1)
        torch.bmm(matrix.expand(across, -1, -1), below, out=out)
    return turned.view(count * across, side, side, channels)


def _lay(tiles_HWTK: Tensor, out_HWK: Tensor, plus_HWK: Tensor | None) -> None:
    """out = tiles side by side + plus; the last tiles may be cut off at the right and at the bottom."""
    tile, width = len(tiles_HWTK), out_HWK.shape[1]
    full = width // tile
    for begin, end, across in ((0, full, tile), (full, full + 1, width % tile)):
        if begin < end and across:
            pixels = slice(begin * tile, begin * tile + (end - begin) * across)
            tiles = tiles_HWTK[:len(out_HWK), :across, begin:end].transpose(1, 2)
            out = out_HWK[:, pixels].unflatten(1, (end - begin, across))
            if plus_HWK is None:
                out.copy_(tiles)
            else:
                torch.add(tiles, plus_HWK[:, pixels].unflatten(1, (end - begin, across)), out=out)
