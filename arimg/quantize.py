"""Linear layers with small weights: 16, 8 or 4 bits each.

fp16: the weight, rounded. int8: w = scale_n * code, one scale per output channel, and activations in two digits of 7
bits. int4: w = scale * (code - 8) + zero for groups of 64 inputs, and activations in 8 bits per row and group. int8 and
int4 multiply whole numbers, whose sums are exact: a row's result depends on no other row and not on how many there are
(kernels/products.cpp). Of such networks the attention keeps rows apart as well (kernels/attention.cpp): rounding would
make another number of a sum in another order, and wide passes would have other laws than narrow ones.

All three are the reading of fewer bytes, which is the time of a narrow pass (docs/bench.md). A kernel that does not run
here is replaced by a slower one, with a notice.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import CheckpointError, InputError, UnknownNameError
from arimg.kernels import build_error
from arimg.kernels.products import GROUP, TILE, KeptWeight, pack_int4, pack_int8

log = logging.getLogger("arimg")

NARROW = 16             # rows up to which torch's kernel for bfloat16 times int8 beats a product of floats
HEADS = ("output", "head")      # attributes under which networks keep the layer that makes logits
_DIGIT = 63             # |high| and |low| at most
_ZERO = 64              # the code of 0 in the unsigned activations


class WeightOnlyLinear(nn.Module):
    """What the layers share: any leading axes, a bias, the input's precision. They cannot be saved."""

    def __init__(self, linear: nn.Linear, bits: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.numbers = linear.weight.numel()            # of weights
        self.stored_bytes = int(self.numbers * bits / 8)
        self.bias = linear.bias
        self.exact = False                              # whether a row's result depends on no other row, bit by bit

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), of the input's dtype."""
        out_MN = self.product(x.reshape(-1, self.in_features)).to(x.dtype)
        if self.bias is not None:
            out_MN = out_MN + self.bias.to(x.dtype)
        return out_MN.view(*x.shape[:-1], self.out_features)

    def product(self, x_MK: Tensor) -> Tensor:
        """(M, N) of rows, float32 or bfloat16."""
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


class PackedWeight:
    """The weight of one layer as a kernel of torch wants it, and the product with it. The weight is no tensor, so
    compiled graphs know it by a number; copies of a layer share it."""

    def __init__(self, product: Callable[[Tensor], Tensor], outputs: int) -> None:
        _define_product()
        self.product, self.outputs, self.number = product, outputs, next(_NUMBERS)
        _PACKED[self.number] = self

    def __call__(self, x_MK: Tensor) -> Tensor:
        """(M, N), float32 in and out."""
        if torch.compiler.is_compiling():
            out_MN: Tensor = torch.ops.arimg.packed_product(x_MK, self.number, self.outputs)
            return out_MN
        return self.product(x_MK)

    def __deepcopy__(self, memo: Any) -> PackedWeight:
        return self


_NUMBERS = count()
_PACKED: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


@cache
def _define_product() -> torch.library.Library:
    """torch.ops.arimg.packed_product, for as long as what it returns lives."""
    library = torch.library.Library("arimg", "FRAGMENT")
    library.define("packed_product(Tensor x, int number, int outputs) -> Tensor")
    library.impl("packed_product", lambda x_MK, number, outputs: _PACKED[number].product(x_MK), "CPU")
    library.impl("packed_product", lambda x_MK, number, outputs: x_MK.new_empty(len(x_MK), outputs), "Meta")
    return library


class HalfLinear(WeightOnlyLinear):
    """Weights in float16, activations and sums in float32; weights beyond 65504 become that."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, bits=16)
        weight_NK = linear.weight.detach().float().clamp(-65504, 65504)
        self.packed = _pack_fp16(weight_NK) if _runs("fp16") else None
        self.weight_NK = weight_NK.half() if self.packed is None else None

    def product(self, x_MK: Tensor) -> Tensor:
        """See WeightOnlyLinear."""
        if self.packed is not None:
            return self.packed(x_MK.float())
        assert self.weight_NK is not None
        return F.linear(x_MK.float(), self.weight_NK.float())


def _pack_fp16(weight_NK: Tensor) -> PackedWeight:
    packed = torch.ops.quantized.linear_prepack_fp16(weight_NK, None)
    return PackedWeight(lambda x_MK: torch.ops.quantized.linear_dynamic_fp16(x_MK, packed), len(weight_NK))


class Int8Linear(WeightOnlyLinear):
    """Symmetric, one scale per output channel. Without our kernel torch's takes the digits of the activations, or else
    activations in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, bits=8)
        weight_NK = linear.weight.detach().float()
        scale_N = weight_NK.abs().amax(1).clamp_min(1e-12) / 127
        codes_NK = (weight_NK / scale_N[:, None]).round().to(torch.int8)
        self.kernel: Callable[[Tensor], Tensor]
        if self.out_features % TILE == 0 and self.in_features % 4 == 0 and _runs("int8"):
            self.exact, self.kernel = True, KeptWeight(*pack_int8(codes_NK, scale_N))
        elif _runs("int8 with digits"):
            self.exact, self.kernel = True, partial(_product_int8_digits, packed=_pack_int8_digits(codes_NK, scale_N))
        else:
            self.kernel = partial(_product_int8_floats, codes_NK=codes_NK, scale_N=scale_N)

    def product(self, x_MK: Tensor) -> Tensor:
        """See WeightOnlyLinear."""
        return self.kernel(x_MK)


def _pack_int8_digits(codes_NK: Tensor, scale_N: Tensor) -> PackedWeight:
    """Its input is whole numbers of 7 bits, its sums are exact. torch means to drop such tensors one day and says
    so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        zeros_N = torch.zeros(len(scale_N), dtype=torch.int64)
        weight_NK = torch._make_per_channel_quantized_tensor(codes_NK, scale_N.double(), zeros_N, 0)
        packed = torch.ops.quantized.linear_prepack(weight_NK, None)
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op     # unchecked: 5 us less
    return PackedWeight(lambda digits_MK: product(digits_MK, 1.0, _ZERO, packed), len(scale_N))


def _product_int8_digits(x_MK: Tensor, packed: PackedWeight) -> Tensor:
    """float32 (M, N) by the two digits of every number, as products.cpp writes it."""
    x_MK = x_MK.float()
    step_M1 = torch.linalg.vector_norm(x_MK, torch.inf, dim=1, keepdim=True).clamp_min(1e-30) / _DIGIT
    steps_MK = x_MK / step_M1
    high_MK = steps_MK.round()
    digits_JK = torch.cat([high_MK, (steps_MK - high_MK) * (2 * _DIGIT)])       # J = 2M
    high_MN, low_MN = packed(digits_JK).chunk(2)
    return torch.add(high_MN, low_MN, alpha=1 / (2 * _DIGIT)).mul_(step_M1)


def _product_int8_floats(x_MK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    if len(x_MK) <= NARROW and _runs("int8 with bfloat16"):
        out_MN: Tensor = torch.ops.aten._weight_int8pack_mm(x_MK.bfloat16(), codes_NK, scale_N.bfloat16())
        return out_MN
    return F.linear(x_MK.float(), codes_NK.float()) * scale_N


class Int4Linear(WeightOnlyLinear):
    """Asymmetric, a scale and a zero per output channel and group of inputs. Our kernel rounds activations to 8 bits, a
    step per row and group; torch's, its fallback, takes them and gives results in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, bits=4 + 32 / GROUP)
        weight_NGg = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        low_NG, high_NG = weight_NGg.amin(-1), weight_NGg.amax(-1)
        scale_NG = ((high_NG - low_NG).clamp_min(1e-12) / 15).bfloat16().float()
        zero_NG = (low_NG + 8 * scale_NG).bfloat16().float()
        codes_NGg = ((weight_NGg - zero_NG[..., None]) / scale_NG[..., None] + 8).round().clamp(0, 15)
        codes_NK = codes_NGg.flatten(1).to(torch.uint8)
        self.kernel: Callable[[Tensor], Tensor]
        if _runs("int4"):
            self.exact, self.kernel = True, KeptWeight(*pack_int4(codes_NK, scale_NG, zero_NG))
            return
        scales_GN2 = torch.stack([scale_NG.t(), zero_NG.t()], dim=-1).bfloat16().contiguous()
        if _runs("int4 with bfloat16"):
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1)
            self.kernel = partial(_product_int4_bfloat16, codes=codes, scales_GN2=scales_GN2)
        else:
            self.kernel = partial(_product_int4_floats, codes_NK=codes_NK, scales_GN2=scales_GN2)

    def product(self, x_MK: Tensor) -> Tensor:
        """See WeightOnlyLinear."""
        return self.kernel(x_MK)


def _product_int4_bfloat16(x_MK: Tensor, codes: Tensor, scales_GN2: Tensor) -> Tensor:
    out_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.bfloat16(), codes, GROUP, scales_GN2)
    return out_MN


def _product_int4_floats(x_MK: Tensor, codes_NK: Tensor, scales_GN2: Tensor) -> Tensor:
    scale_NG, zero_NG = scales_GN2.float().permute(2, 1, 0).unbind()
    codes_NGg = codes_NK.float().unflatten(1, (-1, GROUP)) - 8
    weight_NK = (codes_NGg * scale_NG[..., None] + zero_NG[..., None]).flatten(1)
    return F.linear(x_MK.float(), weight_NK)


QUANTIZED: Mapping[str, Callable[[nn.Linear], WeightOnlyLinear]] = {
    "fp16": HalfLinear, "int8": Int8Linear, "int4": Int4Linear}


def check_quantize(name: str | None) -> None:
    """Raises UnknownNameError unless `name` is None or one of QUANTIZED."""
    if name is not None and name not in QUANTIZED:
        raise UnknownNameError("quantisation", name, QUANTIZED)


def quantize(network: nn.Module, name: str) -> nn.Module:
    """Replace the Linear layers of the network's blocks, and store that of its head in 8 bits at least; embeddings and
    norms stay. Returns the network.

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
    for module in list(blocks.modules()):
        linears = [child for child in module.children() if isinstance(child, nn.Linear)]
        if callable(merge := getattr(module, "merge", None)) and all(_fits(linear, name) for linear in linears):
            merge()
    for parent in [module for block in blocks for module in block.modules()]:
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and _fits(child, name):
                setattr(parent, key, QUANTIZED[name](child))
    for key in HEADS:
        if isinstance(head := getattr(network, key, None), nn.Linear):
            setattr(network, key, HalfLinear(head) if name == "fp16" else Int8Linear(head))
    if name != "fp16":
        _keep_rows_apart(network, blocks)
    return network


def _keep_rows_apart(network: nn.Module, blocks: nn.ModuleList) -> None:
    """Let `network.exact` say whether passes of any width have the same laws, and make it so if this machine can. Keys
    and values are then kept in 16 bits, as a narrow pass reads them all."""
    reason = build_error("attention")
    linears = [layer for layer in blocks.modules() if isinstance(layer, (nn.Linear, WeightOnlyLinear))]
    exact = reason is None and all(getattr(linear, "exact", False) for linear in linears)
    setattr(network, "exact", exact)
    if reason is None:
        setattr(network, "attention_backend", "exact")
    if reason is None and hasattr(network, "kv_dtype"):
        setattr(network, "kv_dtype", torch.bfloat16)
    if not exact:
        why = f"the kernel for attention does not run here ({reason})" if reason else "not all products are exact"
        log.warning("quantisation: %s; decoders that promise the codes of plain decoding keep that nearly", why)


def weight_sizes(network: nn.Module) -> tuple[int, int]:
    """(bytes, numbers) of the weights that one pass reads: all parameters and buffers but the embedding tables, of
    which it looks up single rows."""
    modules = list(network.modules())           # walked once, as every decode asks
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    found = [weight for module in modules for weight in (*module._parameters.values(), *module._buffers.values())]
    read = {id(weight): weight for weight in found if weight is not None and id(weight) not in tables}.values()
    small = [module for module in modules if isinstance(module, WeightOnlyLinear)]
    return (sum(weight.nbytes for weight in read) + sum(module.stored_bytes for module in small),
            sum(weight.numel() for weight in read) + sum(module.numbers for module in small))


def _fits(linear: nn.Linear, name: str) -> bool:
    return name != "int4" or linear.in_features % GROUP == 0 and linear.out_features % TILE == 0


@cache
def _runs(kernel: str) -> bool:
    """Whether this torch has the kernel and it runs here; said once if not."""
    try:
        _TRIALS[kernel]()
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        log.warning("quantisation: the kernel for %s does not run here (%s); taking a slower one", kernel,
                    str(error).splitlines()[0][:100])
        return False
    return True


def _try_fp16() -> None:
    _pack_fp16(torch.ones(16, GROUP))(torch.ones(1, GROUP))


def _try_products() -> None:
    if reason := build_error("products"):
        raise RuntimeError(reason)


def _try_int8_with_digits() -> None:
    codes_NK = torch.ones(16, GROUP, dtype=torch.int8)
    _product_int8_digits(torch.ones(1, GROUP), _pack_int8_digits(codes_NK, torch.ones(16)))


def _try_int8_with_bfloat16() -> None:
    x = torch.ones(1, GROUP, dtype=torch.bfloat16)
    torch.ops.aten._weight_int8pack_mm(x, torch.ones(16, GROUP, dtype=torch.int8), x[0, :16])


def _try_int4_with_bfloat16() -> None:
    x = torch.ones(1, GROUP, dtype=torch.bfloat16)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(16, GROUP, dtype=torch.int32), 1)
    torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, x[0, :32].view(1, 16, 2))


_TRIALS: Mapping[str, Callable[[], None]] = {
    "fp16": _try_fp16, "int8": _try_products, "int8 with digits": _try_int8_with_digits,
    "int8 with bfloat16": _try_int8_with_bfloat16, "int4": _try_products, "int4 with bfloat16": _try_int4_with_bfloat16}
