"""How weights lie in memory while a network paints: the values, shapes and state-dict keys stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.devices import multiplies_bfloat16


class PackedLinear(nn.Linear):
    """nn.Linear with a copy of its weight in the order of oneDNN's kernels, on a CPU in float32, or in bfloat16 where
    the CPU has units for it.

    A product with few rows, which is what a pass of decoding consists of, then takes a third to a half of the time
    (docs/bench.md), and in float32 a row's result hardly ever depends on how many rows there are. The copy is not
    saved, and not used where it is out of date, under autograd or in a compiled graph.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.pack()

    def pack(self) -> None:
        """Copy the weight as it is now."""
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        self._copied = (self.weight, _version(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self._unfit(x.dtype):
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

    def _unfit(self, dtype: torch.dtype) -> bool:
        weight, version = self._copied
        return (self._packed is None or weight is not self.weight or version != _version(weight)
                or weight.dtype != dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        self._packed = None         # the weight may move or change its precision
        moved: PackedLinear = super()._apply(fn, recurse)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}        # copies of these have no storage


def lay_out(network: nn.Module) -> nn.Module:
    """Store weights as their device reads them fastest. Returns the network.

    On a CPU, Linear layers become PackedLinear where that fits. Modules with a method `lay_out` of their own do it
    themselves. Call it again after a change of device or precision, or of the weights.
    """
    packed: dict[nn.Linear, PackedLinear] = {}      # a layer in several places stays one layer
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear):
                if _packable(child):
                    child.pack()
            elif type(child) is nn.Linear and _packable(child):
                if child not in packed:
                    packed[child] = PackedLinear(child)
                setattr(module, name, packed[child])
        if callable(own := getattr(module, "lay_out", None)):
            own()
    return network


def painting(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside it a tokenizer whose weights are float32 paints in `dtype` bfloat16, if the device is a CPU with units for
    it; else as it is."""
    if device.type == "cpu" and dtype == torch.bfloat16 and multiplies_bfloat16(device):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def _version(weight: Tensor) -> int:
    """How many times the values were written to; tensors of inference mode do not count."""
    return -1 if weight.is_inference() else weight._version


def _packable(linear: nn.Linear) -> bool:
    weight = linear.weight
    fits = weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and multiplies_bfloat16(weight.device)
    return fits and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
