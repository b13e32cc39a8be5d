"""Weight-only quantisation: the weights of Linear layers in 8 or 4 bits, activations in the network's precision.

int8: w = scale_n * code, one scale per output channel. int4: w = scale * (code - 8) + zero for groups of 64 inputs.
Products accumulate in float32; activations and results are rounded to bfloat16, as torch's kernels want it. Narrow
passes, whose time is the reading of weights, take those kernels where they run; else the weights are multiplied as
floats with the same rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import CheckpointError, InputError, UnknownNameError

log = logging.getLogger("arimg")

GROUP = 64              # inputs that share a scale in int4
NARROW = 16             # rows up to which torch's int8 kernel beats a product of floats (docs/bench.md)
_INT4_ROWS = 16         # the int4 kernel wants multiples of it


class WeightOnlyLinear(nn.Module):
    """What the quantised layers share: any leading axes, a bias, the input's precision. They cannot be saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), of the input's dtype."""
        out_MN = self.product(x.reshape(-1, self.in_features).bfloat16()).to(x.dtype)
        if self.bias is not None:
            out_MN = out_MN + self.bias.to(x.dtype)
        return out_MN.view(*x.shape[:-1], self.out_features)

    def product(self, x_MK: Tensor) -> Tensor:
        """bfloat16 (M, N) of bfloat16 rows."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightOnlyLinear":
        if fn(torch.empty(0)).device.type != "cpu":
            raise InputError("a quantised network stays on the CPU; load it again without quantize to move it")
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise CheckpointError("a quantised network is not written: save the model in full precision, and give "
                              "quantize when it is loaded")


class Int8Linear(WeightOnlyLinear):
    """Symmetric, one scale per output channel."""

    codes_NK: Tensor
    scale_N: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NK = linear.weight.detach().float()
        scale_N = (weight_NK.abs().amax(1).clamp_min(1e-12) / 127).bfloat16()
        codes_NK = (weight_NK / scale_N.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("codes_NK", codes_NK.to(torch.int8).contiguous())
        self.register_buffer("scale_N", scale_N)

    def product(self, x_MK: Tensor) -> Tensor:
        """See WeightOnlyLinear."""
        if len(x_MK) <= NARROW and _runs("_weight_int8pack_mm", x_MK.device):
            return torch.ops.aten._weight_int8pack_mm(x_MK, self.codes_NK, self.scale_N)
        return (F.linear(x_MK.float(), self.codes_NK.float()) * self.scale_N.float()).bfloat16()


class Int4Linear(WeightOnlyLinear):
    """Asymmetric, a scale and a zero per output channel and group of inputs."""

    codes: Tensor               # packed as the kernel wants them, or uint8 (N, K)
    scales_GN2: Tensor          # (scale, zero)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NGg = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        low_NG, high_NG = weight_NGg.amin(-1), weight_NGg.amax(-1)
        scale_NG = ((high_NG - low_NG).clamp_min(1e-12) / 15).bfloat16().float()
        zero_NG = (low_NG + 8 * scale_NG).bfloat16().float()
        codes_NGg = ((weight_NGg - zero_NG[..., None]) / scale_NG[..., None] + 8).round().clamp(0, 15)
        self.packed = _runs("_weight_int4pack_mm_for_cpu", linear.weight.device)
        codes_NK = codes_NGg.flatten(1).to(torch.int32)
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1) if self.packed
                             else codes_NK.to(torch.uint8))
        self.register_buffer("scales_GN2", torch.stack([scale_NG.t(), zero_NG.t()], dim=-1).bfloat16().contiguous())

    def product(self, x_MK: Tensor) -> Tensor:
        """See WeightOnlyLinear."""
        if self.packed:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, self.codes, GROUP, self.scales_GN2)
        scale_NG, zero_NG = self.scales_GN2.float().permute(2, 1, 0).unbind()
        codes_NGg = self.codes.float().unflatten(1, (-1, GROUP)) - 8
        weight_NK = (codes_NGg * scale_NG[..., None] + zero_NG[..., None]).flatten(1)
        return F.linear(x_MK.float(), weight_NK).bfloat16()


QUANTIZED: Mapping[str, type[WeightOnlyLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def check_quantize(name: str | None) -> None:
    """Raises UnknownNameError unless `name` is None or one of QUANTIZED."""
    if name is not None and name not in QUANTIZED:
        raise UnknownNameError("quantisation", name, QUANTIZED)


def quantize(network: nn.Module, name: str) -> nn.Module:
    """Replace the Linear layers of the network's blocks; embeddings, norms and the head stay. Returns the network.

    Layers whose sizes the format does not fit stay as they are. Raises UnknownNameError, and InputError when the
    network lies on another device than the CPU or has no blocks.
    """
    check_quantize(name)
    blocks = getattr(network, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(f"--quantize {name}: the network {type(network).__name__} has no blocks that are known to "
                         "bear it; leave it out")
    if next(network.parameters()).device.type != "cpu":
        raise InputError(f"--quantize {name}: is made for CPUs, and the model is on "
                         f"{next(network.parameters()).device}; leave it out, or add --device cpu")
    for parent in [module for block in blocks for module in block.modules()]:
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and _fits(child, name):
                setattr(parent, key, QUANTIZED[name](child))
    return network


def _fits(linear: nn.Linear, name: str) -> bool:
    return name == "int8" or linear.in_features % GROUP == 0 and linear.out_features % _INT4_ROWS == 0


@cache
def _runs(kernel: str, device: torch.device) -> bool:
    """Whether this torch has the kernel and it runs here; said once if not."""
    trial = {"_weight_int8pack_mm": _try_int8, "_weight_int4pack_mm_for_cpu": _try_int4}[kernel]
    try:
        trial(device)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.warning("quantisation: torch's kernel %s does not run here (%s); multiplying floats instead, which is "
                    "slower", kernel, str(error).splitlines()[0][:100])
        return False
    return True


def _try_int8(device: torch.device) -> None:
    x = torch.ones(1, GROUP, dtype=torch.bfloat16, device=device)
    torch.ops.aten._weight_int8pack_mm(x, torch.ones(16, GROUP, dtype=torch.int8, device=device), x[0, :16])


def _try_int4(device: torch.device) -> None:
    x = torch.ones(1, GROUP, dtype=torch.bfloat16, device=device)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.ones(16, GROUP, dtype=torch.int32, device=device), 1)
    torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, x[0, :32].view(1, 16, 2))
