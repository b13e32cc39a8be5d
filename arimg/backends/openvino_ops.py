"""Graphs for OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arimg.backends.ops import GROUP, Array, int4_rows, int8_rows, packed

_OPSET = "openvino.opset15"


class OpenvinoOps:
    """See Ops."""

    in_place = False

    def __init__(self, weights: str) -> None:
        from importlib import import_module

        self._weights = weights
        self._o = import_module(_OPSET)
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, shape: Sequence[int], integer: bool = False) -> Any:
        """See Ops."""
        import openvino

        kind = openvino.Type.i64 if integer else openvino.Type.f32
        self._inputs.append(self._o.parameter(openvino.PartialShape(list(shape)), kind, name=name))
        return self._inputs[-1]

    def output(self, name: str, value: Any) -> None:
        """See Ops."""
        result = self._o.result(value)
        result.output(0).get_tensor().set_names({name})
        self._outputs.append(result)

    def constant(self, values: Array) -> Any:
        """See Ops."""
        return self._o.constant(np.ascontiguousarray(values))

    def linear(self, x: Any, weight_NK: Array, fine: bool = False) -> Any:
        """See Ops."""
        return self._o.matmul(x, self._stored(weight_NK, fine), False, True)

    def _stored(self, weight_NK: Array, fine: bool) -> Any:
        """The matrix, computed from its codes."""
        o = self._o
        if self._weights == "float32":
            return self.constant(weight_NK)
        if self._weights == "int4" and not fine and weight_NK.shape[1] % GROUP == 0:
            codes_NGg, zeros_NG, scales_NG = int4_rows(weight_NK)
            centred_NGg = o.subtract(self._nibbles(codes_NGg), self._nibbles(zeros_NG[..., None]))
            weight_NGg = o.multiply(centred_NGg, self.constant(scales_NG[..., None]))
            return o.reshape(weight_NGg, o.constant(list(weight_NK.shape)), False)
        codes_N1K, scales_N1 = int8_rows(weight_NK)
        return o.multiply(o.convert(self.constant(codes_N1K[:, 0]), "f32"), self.constant(scales_N1))

    def _nibbles(self, codes: Array) -> Any:
        """float32 of codes in 4 bits each."""
        import openvino

        flat = packed(codes.reshape(1, -1))[0]
        tensor = openvino.Tensor(flat, openvino.Shape(list(codes.shape)), openvino.Type.u4)
        return self._o.convert(openvino.op.Constant(tensor, shared_memory=False), "f32")

    def rms_norm(self, x: Any, weight: Array, eps: float) -> Any:
        """See Ops."""
        o = self._o
        mean = o.reduce_mean(o.multiply(x, x), o.constant([-1]), True)
        one, small = self.constant(np.ones(1, np.float32)), self.constant(np.array([eps], np.float32))
        scale = o.divide(one, o.sqrt(o.add(mean, small)))
        return o.multiply(o.multiply(x, scale), self.constant(weight))

    def rotate(self, x_RWM: Any, cos_RWF: Any, sin_RWF: Any, heads: int) -> Any:
        """See Ops."""
        o = self._o
        cos_RW1F, sin_RW1F = (o.unsqueeze(table, o.constant(2)) for table in (cos_RWF, sin_RWF))
        a, b = o.split(self.reshape(x_RWM, (0, 0, heads, -1)), o.constant(3), 2).outputs()
        turned = o.concat([o.subtract(o.multiply(a, cos_RW1F), o.multiply(b, sin_RW1F)),
                           o.add(o.multiply(b, cos_RW1F), o.multiply(a, sin_RW1F))], 3)
        return self.reshape(turned, (0, 0, -1))

    def conv(self, x_BCHW: Any, weight_OIhw: Array, bias_O: Array) -> Any:
        """See Ops."""
        pad = [weight_OIhw.shape[2] // 2] * 2
        out = self._o.convolution(x_BCHW, self.constant(weight_OIhw), [1, 1], pad, pad, [1, 1])
        return self._o.add(out, self.constant(bias_O[None, :, None, None]))

    def group_norm(self, x_BCHW: Any, groups: int, weight_C: Array, bias_C: Array, eps: float) -> Any:
        """See Ops."""
        return self._o.group_normalization(x_BCHW, self.constant(weight_C), self.constant(bias_C), groups, eps)

    def upsample(self, x_BCHW: Any) -> Any:
        """See Ops."""
        o = self._o
        return o.interpolate(x_BCHW, self.constant(np.array([2, 2], np.float32)), "nearest", "scales",
                             axes=o.constant([2, 3]), coordinate_transformation_mode="asymmetric",
                             nearest_mode="floor")

    def pixel_shuffle(self, x_BCHW: Any, factor: int) -> Any:
        """See Ops."""
        return self._o.depth_to_space(x_BCHW, "depth_first", factor)

    def add(self, a: Any, b: Any) -> Any:
        """See Ops."""
        return self._o.add(a, b)

    def multiply(self, a: Any, b: Any) -> Any:
        """See Ops."""
        return self._o.multiply(a, b)

    def silu(self, x: Any) -> Any:
        """See Ops."""
        return self._o.swish(x)

    def matmul(self, a: Any, b: Any, transpose_b: bool = False) -> Any:
        """See Ops."""
        return self._o.matmul(a, b, False, transpose_b)

    def softmax(self, x: Any) -> Any:
        """See Ops."""
        return self._o.softmax(x, -1)

    def concat(self, values: Sequence[Any], axis: int) -> Any:
        """See Ops."""
        return self._o.concat(list(values), axis)

    def split(self, x: Any, sizes: Any, axis: int) -> list[Any]:
        """See Ops."""
        lengths = self._o.constant(list(sizes)) if isinstance(sizes, (list, tuple)) else sizes
        return list(self._o.variadic_split(x, self._o.constant(axis), lengths).outputs())

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """See Ops."""
        return self._o.reshape(x, self._o.constant(list(shape)), True)

    def like(self, x: Any, other: Any) -> Any:
        """See Ops."""
        return self._o.reshape(x, self._o.shape_of(other), False)

    def transpose(self, x: Any, order: Sequence[int]) -> Any:
        """See Ops."""
        return self._o.transpose(x, self._o.constant(list(order)))

    def write(self, path: Path) -> None:
        """The graph, and its weights in a second file beside it."""
        import openvino

        model = openvino.Model(self._outputs, self._inputs, path.stem)
        openvino.save_model(model, path, compress_to_fp16=False)
