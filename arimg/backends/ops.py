"""The operators of the exported graphs, and how weights are stored in 8 bits.

A graph is written once (graphs.py) against `Ops`; onnx_ops.py and openvino_ops.py are its two implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from arimg.errors import MissingExtraError, UnknownNameError

RUNTIMES = ("onnx", "openvino")
WEIGHTS = ("float32", "int8", "int4")
GROUP = 64              # inputs that share a scale in int4
_PACKAGES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino",)}

Array = NDArray[Any]
Value = Any             # of the library's own graph


class Ops(Protocol):
    """One graph under construction. Shapes are as in numpy; -1 in the shape of an input is free, and in `reshape` 0
    keeps an axis and -1 is what is left.

    `in_place`: whether it is InPlaceOps.
    """

    in_place: bool

    def input(self, name: str, shape: Sequence[int], integer: bool = False) -> Value:
        """A float32 (or int64) input."""

    def output(self, name: str, value: Value) -> None:
        """Name a result."""

    def constant(self, values: Array) -> Value:
        """Weights that stay as they are."""

    def linear(self, x: Value, weight_NK: Array, fine: bool = False) -> Value:
        """x W^T, (..., K) to (..., N), with the weights stored as the graph was told to; `fine`: in 8 bits at least."""

    def rms_norm(self, x: Value, weight: Array, eps: float) -> Value:
        """Over the last axis."""

    def rotate(self, x_RWM: Value, cos_RWF: Value, sin_RWF: Value, heads: int) -> Value:
        """(a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of each of the heads that make up M."""

    def conv(self, x_BCHW: Value, weight_OIhw: Array, bias_O: Array) -> Value:
        """Stride 1, same size."""

    def group_norm(self, x_BCHW: Value, groups: int, weight_C: Array, bias_C: Array, eps: float) -> Value:
        """Over the channels of a group and all pixels."""

    def upsample(self, x_BCHW: Value) -> Value:
        """Nearest neighbour x2."""

    def pixel_shuffle(self, x_BCHW: Value, factor: int) -> Value:
        """As torch's."""

    def add(self, a: Value, b: Value) -> Value:
        """Elementwise."""

    def multiply(self, a: Value, b: Value) -> Value:
        """Elementwise."""

    def silu(self, x: Value) -> Value:
        """x sigmoid(x)."""

    def matmul(self, a: Value, b: Value, transpose_b: bool = False) -> Value:
        """Of the last two axes."""

    def softmax(self, x: Value) -> Value:
        """Over the last axis."""

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Side by side."""

    def split(self, x: Value, sizes: Sequence[int] | Value, axis: int) -> list[Value]:
        """Into two or more; `sizes` may be an integer input of two numbers."""

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """See the class."""

    def like(self, x: Value, other: Value) -> Value:
        """`x` in the shape of `other`."""

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """Axes in another order."""

    def write(self, path: Path) -> None:
        """Save the graph."""


class InPlaceOps(Ops, Protocol):
    """Of a runtime that may write an input where it lies."""

    def put(self, past: Value, where: Value, new: Value) -> Value:
        """The past with the rows of `new` at the places `where`, whose last axis indexes the first axes of the past."""


def int8_rows(weight_NK: Array, block: int | None = None) -> tuple[Array, Array]:
    """(codes_NGg int8, scales_NG float32): w = scale * code, symmetric, one scale per output channel (G = 1) or per
    `block` inputs, K filled up with zeros. Rounding is that of arimg/quantize.py, with scales in float32."""
    rows, columns = weight_NK.shape
    block = columns if block is None else block
    padded = np.pad(weight_NK.astype(np.float32), ((0, 0), (0, -columns % block)))
    weight_NGg = padded.reshape(rows, -1, block)
    scales_NG = np.maximum(np.abs(weight_NGg).max(-1), 1e-12) / np.float32(127)
    codes_NGg = np.clip(np.round(weight_NGg / scales_NG[..., None]), -127, 127)
    return codes_NGg.astype(np.int8), scales_NG.astype(np.float32)


def int4_rows(weight_NK: Array) -> tuple[Array, Array, Array]:
    """(codes_NGg and zeros_NG in 0 .. 15, uint8, scales_NG float32): w = scale * (code - zero), asymmetric, a scale and
    a zero per GROUP inputs, of which K must be a multiple."""
    rows, _ = weight_NK.shape
    weight_NGg = weight_NK.astype(np.float32).reshape(rows, -1, GROUP)
    low_NG, high_NG = np.minimum(weight_NGg.min(-1), 0), np.maximum(weight_NGg.max(-1), 0)
    scales_NG = np.maximum(high_NG - low_NG, 1e-12) / np.float32(15)
    zeros_NG = np.round(-low_NG / scales_NG)
    codes_NGg = np.clip(np.round(weight_NGg / scales_NG[..., None]) + zeros_NG[..., None], 0, 15)
    return codes_NGg.astype(np.uint8), zeros_NG.astype(np.uint8), scales_NG.astype(np.float32)


def packed(codes: Array) -> Array:
    """Two 4-bit codes of the last axis in one byte, the first in the low half; an odd end is filled up with 0."""
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    both: Array = codes[..., 0::2] | codes[..., 1::2] << 4
    return both


def check_runtime(runtime: str) -> None:
    """Raises UnknownNameError, and MissingExtraError when its package is not installed."""
    if runtime not in RUNTIMES:
        raise UnknownNameError("runtime", runtime, RUNTIMES)
    for package in _PACKAGES[runtime]:
        if find_spec(package) is None:
            raise MissingExtraError("export", package, f"the runtime {runtime}")
