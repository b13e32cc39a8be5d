"""The convolutions that paint with fewer products give what torch's give."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from arimg.devices import multiplies_bfloat16
from arimg.tokenizers import winograd
from arimg.tokenizers.vq import VQConfig
from arimg.tokenizers.winograd import Conv3x3
from tests.tokenizers.test_vq import toy

needs_nnpack = pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="this torch has no NNPACK")


def conv(channels_in: int = 64, channels_out: int = 96) -> Conv3x3:
    torch.manual_seed(0)
    return Conv3x3(channels_in, channels_out).requires_grad_(False)


def norm(channels: int = 64) -> nn.GroupNorm:
    layer = nn.GroupNorm(32, channels, eps=1e-6).requires_grad_(False)
    layer.weight.uniform_(0.5, 2)
    layer.bias.uniform_(-1, 1)
    return layer


def maps(height: int, width: int, channels: int = 64, batch: int = 2) -> Tensor:
    """Far from zero mean, so that variances need care."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1)) + 20


SIZES = [(16, 16), (32, 24), pytest.param((40, 48), marks=needs_nnpack), pytest.param((38, 31), marks=needs_nnpack)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_equals_the_plain_convolution(double: bool, normed: bool, added: bool, size: tuple[int, int]) -> None:
    if double:
        size = (2 * (size[0] // 2), 2 * (size[1] // 2))
    layer, before = conv(), norm() if normed else None
    x_BCHW = maps(*(side // (1 + double) for side in size))
    plus = torch.randn(2, 96, *size) if added else None
    given = [one.clone() for one in (x_BCHW, plus) if one is not None]
    expected = layer.paint(x_BCHW, before, double, plus)
    layer.lay_out()
    got = layer.paint(x_BCHW, before, double, plus)
    assert got.shape == expected.shape and 0 < float((got - expected).abs().max()) < 3e-5 * float(expected.abs().max())
    alone = layer.paint(x_BCHW[1:], before, double, None if plus is None else plus[1:])
    assert torch.equal(alone, got[1:]), "an image does not depend on the batch"
    assert all(torch.equal(one, old) for one, old in zip((x_BCHW, plus), given) if one is not None), "inputs stay"


@pytest.mark.skipif(not multiplies_bfloat16(torch.device("cpu")), reason="this CPU has no units for bfloat16")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("added", [False, True])
@torch.no_grad()
def test_packed_weights_are_those_of_autocast(double: bool, added: bool) -> None:
    layer, before = conv(), norm()
    x_BCHW, plus = maps(16, 12), torch.randn(2, 96, 16 * (1 + double), 12 * (1 + double)) if added else None
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer.paint(x_BCHW, before, double, plus)
        layer.lay_out()
        got = layer.paint(x_BCHW, before, double, plus)
        alone = layer.paint(x_BCHW[1:], before, double, None if plus is None else plus[1:])
        again = copy.deepcopy(layer).paint(x_BCHW, before, double, plus)
    assert layer._packed is not None and got.dtype == torch.bfloat16
    assert float((got - expected).abs().max()) <= 0.01 * float(expected.abs().max())
    assert torch.equal(alone, got[1:]) and torch.equal(again, got)
    layer.float()
    assert layer._packed is None


@needs_nnpack
@torch.no_grad()
def test_a_large_map_goes_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_BCHW = conv(), maps(50, 40, batch=1)
    layer.lay_out()
    whole = layer.paint(x_BCHW)
    monkeypatch.setattr(winograd, "STRIP", 12 * 40 * 96)
    with patch.object(torch, "_nnpack_spatial_convolution", wraps=torch._nnpack_spatial_convolution) as convolve:
        strips = layer.paint(x_BCHW)
    assert [call.args[0].shape[2] for call in convolve.call_args_list] == [14, 14, 14, 14, 4]
    assert float((strips - whole).abs().max()) < 3e-5 * float(whole.abs().max())


@torch.no_grad()
def test_shapes_that_do_not_fit_take_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv()
    layer.lay_out()
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: False)
    for height, width in ((30, 32), (32, 31), (8, 16), (40, 40)):
        assert torch.equal(layer.paint(maps(height, width)), layer(maps(height, width)))


def test_training_takes_the_plain_one() -> None:
    layer, x_BCHW = conv(), maps(32, 32)
    layer.lay_out()
    assert torch.equal(layer.paint(x_BCHW), layer(x_BCHW))
    x_BCHW.requires_grad_(True)
    layer.paint(x_BCHW).sum().backward()
    assert x_BCHW.grad is not None


@torch.no_grad()
def test_prepared_weights_are_forgotten_when_the_others_change() -> None:
    layer, x_BCHW = conv(), maps(16, 16)
    for change in (lambda: layer.double(), lambda: layer.float(), lambda: layer.load_state_dict(conv().state_dict()),
                   lambda: layer.to("meta")):
        layer.lay_out()
        if layer.weight.dtype == torch.float32:
            layer.paint(x_BCHW)
            assert layer._weight_QCK is not None
        change()
        assert not layer._laid_out and layer._weight_QCK is None
    for other in (conv(32, 96), conv().double()):
        other.lay_out()
        assert not other._laid_out
    assert list(conv().state_dict()) == ["weight", "bias"]


@torch.no_grad()
def test_a_tokenizer_paints_the_same_picture() -> None:
    config = VQConfig(codebook_size=64, codebook_dim=4, base_channels=64, multipliers=(1, 2), res_blocks=1,
                      z_channels=32)
    tokenizer = toy(config)
    codes_BL = torch.randint(64, (2, 32 * 48), generator=torch.Generator().manual_seed(2))
    expected = tokenizer.decode_codes(codes_BL, (32, 48))
    for block in tokenizer.decoder.modules():
        if isinstance(block, Conv3x3):
            block.lay_out()
    got = tokenizer.decode_codes(codes_BL, (32, 48))
    assert 0 < float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
