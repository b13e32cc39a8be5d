"""Graphs for ONNX Runtime. Operators of the domain com.microsoft are its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arimg.backends.ops import GROUP, Array, int4_rows, int8_rows, packed

OPSET = 23
_IR_VERSION = 11
BLOCK = 128             # inputs that share a scale in int8: the fastest of 16 ... 256 with AVX2
_INT8_PRODUCTS = 4      # MatMulNBits' accuracy_level: activations in 8 bits, row by row and block by block
_OWN = "com.microsoft"


class OnnxOps:
    """See InPlaceOps."""

    in_place = True

    def __init__(self, weights: str) -> None:
        self._weights = weights
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._count}"

    def _op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        from onnx import helper

        names = [self._name(kind) for _ in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def _shape(self, shape: Sequence[int]) -> str:
        return self.constant(np.array(shape, np.int64))

    def input(self, name: str, shape: Sequence[int], integer: bool = False) -> str:
        """See Ops."""
        from onnx import TensorProto, helper

        sizes = [f"{name}_{axis}" if size < 0 else size for axis, size in enumerate(shape)]
        kind = TensorProto.INT64 if integer else TensorProto.FLOAT
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return name

    def output(self, name: str, value: str) -> None:
        """See Ops."""
        from onnx import TensorProto, helper

        for node in self._nodes:
            node.output[:] = [name if one == value else one for one in node.output]
            node.input[:] = [name if one == value else one for one in node.input]
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def constant(self, values: Array) -> str:
        """See Ops."""
        from onnx import numpy_helper

        name = self._name("constant")
        self._tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def linear(self, x: str, weight_NK: Array, fine: bool = False) -> str:
        """See Ops."""
        if self._weights == "float32":
            return self.matmul(x, self.constant(weight_NK.T))
        if self._weights == "int4" and not fine and weight_NK.shape[1] % GROUP == 0:
            codes_NGg, zeros_NG, scales_NG = int4_rows(weight_NK)
            return self._small(x, weight_NK.shape, GROUP, 4, packed(codes_NGg), scales_NG, packed(zeros_NG))
        codes_NGg, scales_NG = int8_rows(weight_NK, BLOCK)
        return self._small(x, weight_NK.shape, BLOCK, 8, (codes_NGg.astype(np.int16) + 128).astype(np.uint8), scales_NG)

    def _small(self, x: str, shape: tuple[int, ...], block: int, bits: int, *tensors: Array) -> str:
        """Codes, scales and, where they are not in the middle of the range, zeros."""
        return self._op("MatMulNBits", x, *map(self.constant, tensors), domain=_OWN, N=shape[0], K=shape[1], bits=bits,
                        block_size=block, accuracy_level=_INT8_PRODUCTS)

    def rms_norm(self, x: str, weight: Array, eps: float) -> str:
        """See Ops."""
        return self._op("RMSNormalization", x, self.constant(weight), axis=-1, epsilon=eps)

    def rotate(self, x_RWM: str, cos_RWF: str, sin_RWF: str, heads: int) -> str:
        """See Ops."""
        return self._op("RotaryEmbedding", x_RWM, cos_RWF, sin_RWF, num_heads=heads)

    def conv(self, x_BCHW: str, weight_OIhw: Array, bias_O: Array) -> str:
        """See Ops."""
        return self._op("Conv", x_BCHW, self.constant(weight_OIhw), self.constant(bias_O),
                        pads=[weight_OIhw.shape[2] // 2] * 4)

    def group_norm(self, x_BCHW: str, groups: int, weight_C: Array, bias_C: Array, eps: float) -> str:
        """See Ops."""
        return self._op("GroupNormalization", x_BCHW, self.constant(weight_C), self.constant(bias_C),
                        num_groups=groups, epsilon=eps)

    def upsample(self, x_BCHW: str) -> str:
        """See Ops."""
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        return self._op("Resize", x_BCHW, "", scales, mode="nearest", nearest_mode="floor",
                        coordinate_transformation_mode="asymmetric")

    def pixel_shuffle(self, x_BCHW: str, factor: int) -> str:
        """See Ops."""
        return self._op("DepthToSpace", x_BCHW, blocksize=factor, mode="CRD")

    def add(self, a: str, b: str) -> str:
        """See Ops."""
        return self._op("Add", a, b)

    def multiply(self, a: str, b: str) -> str:
        """See Ops."""
        return self._op("Mul", a, b)

    def silu(self, x: str) -> str:
        """See Ops."""
        return self._op("QuickGelu", x, domain=_OWN, alpha=1.0)

    def matmul(self, a: str, b: str, transpose_b: bool = False) -> str:
        """See Ops."""
        return self._op("FusedMatMul", a, b, domain=_OWN, transB=1) if transpose_b else self._op("MatMul", a, b)

    def softmax(self, x: str) -> str:
        """See Ops."""
        return self._op("Softmax", x, axis=-1)

    def concat(self, values: Sequence[str], axis: int) -> str:
        """See Ops."""
        return self._op("Concat", *values, axis=axis)

    def split(self, x: str, sizes: Sequence[int] | str, axis: int) -> list[str]:
        """See Ops."""
        count = 2 if isinstance(sizes, str) else len(sizes)
        return self._op("Split", x, sizes if isinstance(sizes, str) else self._shape(sizes), outputs=count, axis=axis)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """See Ops."""
        return self._op("Reshape", x, self._shape(shape))

    def like(self, x: str, other: str) -> str:
        """See Ops."""
        return self._op("Reshape", x, self._op("Shape", other))

    def transpose(self, x: str, order: Sequence[int]) -> str:
        """See Ops."""
        return self._op("Transpose", x, perm=list(order))

    def put(self, past: str, where: str, new: str) -> str:
        """See InPlaceOps."""
        return self._op("ScatterND", past, where, new)

    def write(self, path: Path) -> None:
        """The graph, and its weights in a second file beside it."""
        import onnx
        from onnx import helper

        graph = helper.make_graph(self._nodes, path.stem, self._inputs, self._outputs, self._tensors)
        model = helper.make_model(graph, ir_version=_IR_VERSION, producer_name="arimg", opset_imports=[
            helper.make_opsetid("", OPSET), helper.make_opsetid(_OWN, 1)])
        helper.set_model_props(model, {"weights": self._weights})
        onnx.save_model(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
