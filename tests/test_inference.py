"""Layers as they lie in memory for painting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from arimg.devices import multiplies_bfloat16
from arimg.inference import PackedLinear, lay_out, painting
from arimg.tokenizers.vq import VQConfig, VQTokenizer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def pair(bias: bool = True) -> tuple[nn.Linear, PackedLinear]:
    linear = nn.Linear(48, 80, bias)
    packed = lay_out(nn.Sequential(copy.deepcopy(linear)))[0]
    assert isinstance(packed, PackedLinear)
    return linear, packed


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_same_product(bias: bool) -> None:
    linear, packed = pair(bias)
    x = torch.randn(3, 5, 48)
    torch.testing.assert_close(packed(x), linear(x), atol=1e-6, rtol=1e-5)
    assert packed.state_dict().keys() == linear.state_dict().keys()


@torch.no_grad()
def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    _, packed = pair()
    x_RC = torch.randn(65, 48)
    whole = packed(x_RC)
    for rows in (1, 2, 3, 8, 17, 64):
        assert torch.equal(packed(x_RC[:rows]), whole[:rows])


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load", "assign", "double"])
def test_a_copy_that_is_out_of_date_is_not_used(change: str) -> None:
    linear, packed = pair()
    other = nn.Linear(48, 80)
    if change == "in place":
        packed.weight.mul_(2)
        linear.weight.mul_(2)
    elif change == "double":
        linear, packed = linear.double(), packed.double()
    else:
        linear = other
        packed.load_state_dict(other.state_dict(), assign=change == "assign")
    x = torch.randn(2, 48, dtype=linear.weight.dtype)
    torch.testing.assert_close(packed(x), linear(x), atol=1e-6, rtol=1e-5)


def test_it_learns() -> None:
    linear, packed = pair()
    x = torch.randn(2, 48)
    packed(x).square().sum().backward()
    linear(x).square().sum().backward()
    assert packed.weight.grad is not None
    torch.testing.assert_close(packed.weight.grad, linear.weight.grad)


@torch.no_grad()
def test_copies_of_the_layer() -> None:
    _, packed = pair()
    twin = lay_out(nn.Sequential(copy.deepcopy(packed)))[0]
    twin.weight.zero_()
    x = torch.randn(2, 48)
    assert torch.equal(twin(x), packed.bias.expand(2, -1)) and not torch.equal(packed(x), twin(x))


def test_a_layer_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(4, 4)
    network = lay_out(nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)]))
    assert network[0][0] is network[1][0] and len(list(network.parameters())) == 2


def test_other_precisions_stay_as_they_are() -> None:
    assert type(lay_out(nn.Sequential(nn.Linear(4, 4).double()))[0]) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("units", [False, True])
def test_bfloat16_where_the_processor_has_units(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if units and not multiplies_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU has no units for bfloat16")
    monkeypatch.setattr("arimg.inference.multiplies_bfloat16", lambda device: units)
    linear = nn.Linear(48, 80).bfloat16()
    packed = lay_out(nn.Sequential(copy.deepcopy(linear)))[0]
    assert isinstance(packed, PackedLinear) == units
    x = torch.randn(3, 48).bfloat16()
    torch.testing.assert_close(packed(x), linear(x), atol=2e-2, rtol=2e-2)
    assert packed.float()(x.float()).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("units", [False, True])
def test_painting_in_bfloat16(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the picture of float32, and the same one in a batch; without units the very picture of float32."""
    monkeypatch.setattr("arimg.inference.multiplies_bfloat16", lambda device: units)
    tokenizer = VQTokenizer(VQConfig(codebook_size=64, codebook_dim=4, base_channels=64, multipliers=(1, 2),
                                     res_blocks=1, z_channels=32)).eval()
    lay_out(tokenizer.decoder)
    codes_BL = torch.randint(64, (2, 256), generator=torch.Generator().manual_seed(2))
    exact = tokenizer.decode_codes(codes_BL, (16, 16))
    for dtype, differs in ((torch.float32, False), (torch.bfloat16, units)):
        with painting(torch.device("cpu"), dtype):
            got = tokenizer.decode_codes(codes_BL, (16, 16))
            alone = tokenizer.decode_codes(codes_BL[1:], (16, 16))
        assert torch.equal(got, exact) != differs and torch.equal(alone, got[1:])
        assert float((got - exact).abs().max()) < 0.05 * float(exact.abs().max())


@torch.inference_mode()
def test_inference_mode() -> None:
    packed = lay_out(nn.Sequential(nn.Linear(4, 4)))[0]
    assert packed(torch.ones(1, 4)).shape == (1, 4)
