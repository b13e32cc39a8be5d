"""Weights of 16, 8 and 4 bits: how far results move, and that decoding keeps its promises on them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arimg import quantize as module
from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, Guidance
from arimg.accel.jacobi import Jacobi
from arimg.accel.target import Target
from arimg.errors import CheckpointError, InputError, UnknownNameError
from arimg.kernels import build_error
from arimg.kernels.products import KeptWeight, int4_product, int8_product, pack_int4, pack_int8
from arimg.models.ar import ARTransformer
from arimg.pipeline import Pipeline
from arimg.quantize import QUANTIZED, HalfLinear, Int8Linear, WeightOnlyLinear, quantize, weight_sizes
from tests.models.toy import toy_classes, toy_codes, toy_model

ERRORS = {"fp16": 4e-4, "int8": 0.012, "int4": 0.12}       # relative, of Gaussian weights


def linear(inputs: int = 192, outputs: int = 80, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight.normal_(std=0.02)
    return layer


def rows(count: int, inputs: int = 192) -> Tensor:
    """Gaussian; the first has an outlier, the second is zero, the third small."""
    x_MK = torch.randn(count, inputs, generator=torch.Generator().manual_seed(1))
    x_MK[0, 5] = 30.0
    x_MK[1:2] = 0.0
    x_MK[2:3] *= 1e-3
    return x_MK


def whole_rows(count: int, inputs: int = 192) -> Tensor:
    """Whole numbers up to 127, which each group of 64 has, times a power of two."""
    generator = torch.Generator().manual_seed(1)
    whole_MGg = torch.randint(-127, 128, (count, inputs // 64, 64), generator=generator)
    whole_MGg[..., 7] = 127
    return whole_MGg.flatten(1) / 64


@pytest.mark.parametrize("name", QUANTIZED)
def test_results_stay_near(name: str) -> None:
    layer, x_MK = linear(), rows(6)
    small = QUANTIZED[name](layer)
    exact_MN, got_MN = layer(x_MK) - layer.bias, small(x_MK) - layer.bias
    for exact_N, got_N in zip(exact_MN, got_MN):
        assert float((got_N - exact_N).norm()) <= ERRORS[name] * float(exact_N.norm()) + 1e-5
    assert float((got_MN - exact_MN).norm()) > 0, "something was rounded"
    assert small(x_MK.view(2, 3, -1)).shape == (2, 3, 80) and small(x_MK.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rows_do_not_know_one_another(name: str) -> None:
    small = QUANTIZED[name](linear())
    x_MK = rows(140)
    all_MN = small(x_MK)
    for part in (slice(0, 1), slice(1, 4), slice(7, 9), slice(3, 40)):
        assert torch.equal(small(x_MK[part]), all_MN[part])


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("count", [2, 40])
def test_slower_kernels_give_the_same(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_MK = linear(), rows(count)
    if name == "int4":      # our kernel rounds activations to 8 bits: give it some that it need not round
        x_MK = whole_rows(count)
    fast_MN = QUANTIZED[name](layer)(x_MK)
    missing: set[str] = set()
    for kernels in ({"fp16", "int8", "int4"}, {"int8 with digits"}, {"int8 with bfloat16", "int4 with bfloat16"}):
        missing |= kernels
        monkeypatch.setattr(module, "_runs", lambda kernel: kernel not in missing)
        slow_MN = QUANTIZED[name](layer)(x_MK)
        rounds = name == "int8" and "int8 with digits" in missing and "int8 with bfloat16" not in missing
        assert float((slow_MN - fast_MN).norm()) <= (1e-2 if rounds else 3e-3) * float(fast_MN.norm())


def test_a_missing_kernel_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NotImplementedError("no such operator\nand a long story")

    monkeypatch.setitem(module._TRIALS, "trial", fails)     # type: ignore[index]
    with caplog.at_level("WARNING"):
        assert not module._runs("trial") and not module._runs("trial")
    assert caplog.messages == ["quantisation: the kernel for trial does not run here (no such operator); taking a "
                               "slower one"]


@pytest.mark.parametrize("name", QUANTIZED)
@torch.no_grad()
def test_only_blocks_and_head(name: str) -> None:
    plain, small = toy_model(dim=64, ffn_hidden=128), toy_model(dim=64, ffn_hidden=128)
    full_bytes, numbers = weight_sizes(plain)
    assert quantize(small, name) is small
    assert not any(isinstance(layer, nn.Linear) for layer in small.layers.modules())
    assert isinstance(small.output, HalfLinear if name == "fp16" else Int8Linear)
    assert isinstance(small.tok_embeddings, nn.Embedding)
    assert torch.equal(small.norm.weight, plain.norm.weight)
    small_bytes, same_numbers = weight_sizes(small)
    assert same_numbers == numbers and small_bytes < {"fp16": 0.56, "int8": 0.32, "int4": 0.22}[name] * full_bytes
    drift = (small(toy_codes(2), toy_classes(2), (4, 4)) - plain(toy_codes(2), toy_classes(2), (4, 4))).abs().max()
    assert 0 < float(drift) < {"fp16": 0.05, "int8": 2.0, "int4": 25.0}[name]


def test_sizes_that_do_not_fit_stay() -> None:
    small = quantize(toy_model(dim=32, ffn_hidden=48), "int4")
    assert any(isinstance(layer, nn.Linear) for layer in small.layers.modules())


@pytest.mark.parametrize("name", QUANTIZED)
def test_jacobi_paints_the_codes_of_plain_decoding(name: str) -> None:
    model = toy_model(dim=64, ffn_hidden=128)
    quantize(model, name)
    request = DecodeRequest(toy_classes(3), (4, 4), torch.arange(3), guidance=Guidance(2.0))

    def codes(decoder: Decoder) -> Tensor:
        codes_BL = decoder.decode(Target(model, request), request).codes_BL
        assert codes_BL is not None
        return codes_BL
    for window in (2, 8):
        assert torch.equal(codes(Jacobi(window)), codes(PlainAR()))


@pytest.fixture
def kernel() -> None:
    """Our own, or the reason why there is none."""
    if reason := build_error("products"):
        pytest.skip(f"the kernel cannot be built here: {reason}")


@pytest.mark.usefixtures("kernel")
def test_products_and_rounding_of_our_int4_kernel() -> None:
    """Exact for whole activations, with 1 to 7 rows; others move by half a step of their group at most."""
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(16, (48, 192), generator=generator, dtype=torch.uint8)
    scale_NG, zero_NG = (torch.randn(48, 3, generator=generator).bfloat16().float() for _ in range(2))
    weight_NGg = (codes_NK.double() - 8).unflatten(1, (3, -1)) * scale_NG[..., None] + zero_NG[..., None]
    weight_NK, packed = weight_NGg.flatten(1), pack_int4(codes_NK, scale_NG, zero_NG)
    for count in range(1, 8):
        x_MK = whole_rows(count)
        exact_MN = x_MK.double() @ weight_NK.T
        assert float((int4_product(x_MK, *packed) - exact_MN).abs().max()) <= 1e-5 * float(exact_MN.abs().max())
    x_MK = rows(7)
    half_MK = x_MK.unflatten(1, (3, -1)).abs().amax(-1).repeat_interleave(64, 1).double() / 254
    moved_MN = (int4_product(x_MK, *packed) - x_MK.double() @ weight_NK.T).abs()
    assert bool((moved_MN <= 1.001 * half_MK @ weight_NK.abs().T + 1e-4).all()) and float(moved_MN.max()) > 1e-3


@pytest.mark.usefixtures("kernel")
def test_products_and_rounding_of_our_int8_kernel() -> None:
    """Activations move by half a step of their row's second digit at most, whatever the codes, with 1 to 7 rows."""
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(-127, 128, (48, 192), generator=generator).to(torch.int8)
    codes_NK[0], codes_NK[1] = 127, -127
    scale_N = torch.rand(48, generator=generator) + 0.1
    weight_NK, packed = codes_NK.double() * scale_N.double()[:, None], pack_int8(codes_NK, scale_N)
    for count in range(1, 8):
        x_MK = rows(count)
        x_MK[0, 10:] = x_MK[0, 5]       # the largest sums there are
        half_M1 = x_MK.double().abs().amax(1, keepdim=True) / (63 * 126 * 2)
        exact_MN = x_MK.double() @ weight_NK.T
        moved_MN = (int8_product(x_MK, *packed) - exact_MN).abs()
        assert bool((moved_MN <= 1.001 * half_M1 * weight_NK.abs().sum(1) + 1e-6 * exact_MN.abs()).all())
        assert bool((moved_MN > 0).any())


@pytest.mark.usefixtures("kernel")
def test_weights_live_as_long_as_the_layers_that_have_them() -> None:
    codes_NK = torch.arange(48 * 64).view(48, 64).remainder(251).sub(125).to(torch.int8)
    packed, x_MK = pack_int8(codes_NK, torch.ones(48)), rows(3)[:, :64]
    weight = KeptWeight(*packed)
    number, copied = weight.number, copy.deepcopy(weight)
    assert torch.equal(weight(x_MK), int8_product(x_MK.contiguous(), *packed))
    sent = pickle.loads(pickle.dumps(weight))
    assert sent.number != number and torch.equal(sent(x_MK), weight(x_MK))
    del weight
    copied(x_MK)
    del copied
    with pytest.raises(RuntimeError, match=f"no such weights: {number}"):
        torch.ops.arimg.kept_product(x_MK.contiguous(), number, 48)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_value_that_is_not_finite_shows(name: str, value: float) -> None:
    small, x_MK = QUANTIZED[name](linear()), rows(3)
    plain_MN = small(x_MK)
    x_MK[1, 70] = value
    got_MN = small(x_MK)
    assert not got_MN[1].isfinite().any() and torch.equal(got_MN[::2], plain_MN[::2])


def test_a_kernel_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(CppCodeCache, "load", fails)
    assert build_error.__wrapped__("products") == "no C++ compiler"


@torch.no_grad()
def test_negative_log_likelihood_of_the_embedded_model() -> None:
    """int8 moves it by less than half a percent; int4's change is in docs/bench.md."""
    def likelihood(network: ARTransformer, codes_BL: Tensor) -> float:
        condition = toy_classes(len(codes_BL))
        logits_BLV = network(codes_BL, condition, (16, 16))
        return float(nn.functional.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten()))

    pipe = Pipeline.from_pretrained("emoji", device="cpu", dtype="float32")
    codes_BL = pipe(class_name=0, n=2, cfg=1.0, seed=5, decoder="jacobi", lossy=True).codes
    before = likelihood(pipe.transformer, codes_BL)
    changes = {}
    for name in ("fp16", "int8"):
        network = Pipeline.from_pretrained("emoji", device="cpu", dtype="float32", quantize=name).transformer
        changes[name] = abs(likelihood(network, codes_BL) / before - 1)
    assert changes["fp16"] < 5e-4 and changes["int8"] < 5e-3, changes


def test_errors() -> None:
    with pytest.raises(UnknownNameError, match="unknown quantisation 'int3'; did you mean int"):
        quantize(toy_model(), "int3")
    with pytest.raises(InputError, match="--quantize int8: the network Linear has no blocks"):
        quantize(nn.Linear(2, 2), "int8")
    with pytest.raises(InputError, match="--quantize int8: is made for CPUs, and the model is on meta"):
        quantize(toy_model().to("meta"), "int8")
    small = quantize(toy_model(), "int8")
    with pytest.raises(CheckpointError, match="a quantised network is not written"):
        small.state_dict()
    with pytest.raises(InputError, match="a quantised network stays on the CPU"):
        small.to("meta")


def test_a_bias_follows_the_precision() -> None:
    small: WeightOnlyLinear = Int8Linear(linear()).double()
    assert small.bias is not None and small.bias.dtype == torch.float64
    assert small(rows(2).double()).dtype == torch.float64
