"""The multi-scale tokenizer: hand-written scales, phis, gradients, lookups, memory, user errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.checkpoints import load_component, save_component
from arimg.errors import ConfigError, InputError
from arimg.presets import VAR_SIDES, square_scales
from arimg.tokenizers import vq
from arimg.tokenizers.multiscale import (RELEASED_PHIS, MultiscaleConfig, MultiscaleQuantizer, MultiscaleSpace,
                                         MultiscaleTokenizer, phi_of_scale)

TOY = MultiscaleConfig(codebook_size=24, codebook_dim=4, base_channels=32, multipliers=(1, 1), res_blocks=1,
                       scales=square_scales((1, 2, 3, 4)))
LENGTH = 1 + 4 + 9 + 16


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(config: MultiscaleConfig = TOY) -> MultiscaleTokenizer:
    """A random tokenizer with well separated codes."""
    torch.manual_seed(0)
    tokenizer = MultiscaleTokenizer(config).eval()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.normal_()
    return tokenizer


def images(side: int = 8, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=seeded()) * 2 - 1


def plain_space(codebook_VC: Tensor, *sides: int, z_norm: bool = False) -> MultiscaleSpace:
    """A space without phis."""
    return MultiscaleSpace(codebook_VC, square_scales(sides), (torch.nn.Identity(),) * len(sides), z_norm)


# ---------------------------------------------------------------------------------------------------------------------
# Scales by hand


def test_two_scales_by_hand() -> None:
    """The first scale codes the mean, the second what is left of each pixel."""
    space = plain_space(torch.tensor([[-1.0], [0.0], [1.0], [4.0]]), 1, 2)
    f_BChw = torch.tensor([[[[5.0, 4.0], [3.0, 4.0]]]])
    codes_BL, maps = space.quantise(f_BChw)
    assert codes_BL.tolist() == [[3, 2, 1, 0, 1]]
    assert torch.equal(maps[0], torch.full((1, 1, 2, 2), 4.0)) and torch.equal(maps[1], f_BChw)


def test_next_input_is_the_area_mean_and_the_last_scale_is_not_resized() -> None:
    space = plain_space(torch.zeros(1, 1), 1, 2, 4)
    map_BChw = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(space.next_input(map_BChw, 1)[0, :, 0], torch.tensor([2.5, 4.5, 10.5, 12.5]))
    assert torch.equal(space.next_input(map_BChw, 2)[0, :, 0], torch.arange(16.0))
    vectors_BWC = torch.randn(1, 16, 1, generator=seeded())
    assert torch.equal(space.accumulate(None, vectors_BWC, 2)[0, 0].flatten(), vectors_BWC[0, :, 0])


def test_coarse_scales_are_enlarged_bicubically() -> None:
    space = plain_space(torch.zeros(1, 2), 2, 4)
    vectors_BWC = torch.randn(1, 4, 2, generator=seeded())
    expected = F.interpolate(vectors_BWC.transpose(1, 2).unflatten(2, (2, 2)), (4, 4), mode="bicubic",
                             align_corners=False)
    assert torch.equal(space.accumulate(None, vectors_BWC, 0), expected)
    assert torch.equal(space.accumulate(torch.ones(1, 2, 4, 4), vectors_BWC, 0), 1 + expected)


@torch.no_grad()
def test_encoding_and_decoding_meet() -> None:
    tokenizer = toy()
    encoded = tokenizer.encode(images())
    assert encoded.codes_BL.shape == (2, LENGTH) and encoded.grid == (4, 4) and tokenizer.stride == 2
    assert torch.equal(tokenizer.lookup(encoded.codes_BL, (4, 4)), encoded.latents_BChw)
    assert torch.equal(tokenizer.decode_codes(encoded.codes_BL, (4, 4)), tokenizer.decode(encoded.latents_BChw))
    assert tokenizer.decode(encoded.latents_BChw).shape == (2, 3, 8, 8)


@torch.no_grad()
def test_scales_of_other_shapes_and_image_sizes() -> None:
    tokenizer = toy()
    scales = ((1, 1), (2, 3), (4, 6))
    picture = torch.rand(1, 3, 8, 12, generator=seeded()) * 2 - 1
    encoded = tokenizer.encode(picture, scales)
    assert encoded.codes_BL.shape == (1, 1 + 6 + 24) and encoded.grid == (4, 6)
    assert tokenizer.decode_codes(encoded.codes_BL, (4, 6), scales).shape == (1, 3, 8, 12)
    assert tokenizer.space(scales).scales == scales and tokenizer.space().scales == TOY.scales


def test_one_scale_is_a_plain_quantiser() -> None:
    tokenizer = toy(replace(TOY, scales=((4, 4),), phis=1))
    codes_BL, maps = tokenizer.encode_scales(images())
    assert codes_BL.shape == (2, 16) and len(maps) == 1


@torch.no_grad()
def test_images_of_a_batch_do_not_meet() -> None:
    tokenizer, batch = toy(), images(batch=3)
    alone = torch.cat([tokenizer.encode(image[None]).codes_BL for image in batch])
    assert torch.equal(tokenizer.encode(batch).codes_BL, alone)


# ---------------------------------------------------------------------------------------------------------------------
# Phis


def test_phi_by_hand() -> None:
    quantizer = MultiscaleQuantizer(replace(TOY, phis=1, residual_ratio=-0.25))
    (phi,) = quantizer.phis
    torch.nn.init.constant_(phi.weight, 0.0)
    torch.nn.init.constant_(phi.bias, 8.0)
    assert torch.equal(phi(torch.full((1, 4, 2, 2), 4.0)), torch.full((1, 4, 2, 2), 0.75 * 4 + 0.25 * 8))


def test_without_ratio_there_are_no_phis() -> None:
    quantizer = MultiscaleQuantizer(replace(TOY, residual_ratio=0.0))
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    vectors_BWC = torch.randn(1, 16, 4, generator=seeded())
    assert torch.equal(quantizer.space().accumulate(None, vectors_BWC, 3).flatten(2).transpose(1, 2), vectors_BWC)


@pytest.mark.parametrize(("phis", "count"), [(0, 4), (1, 1), (2, 2), (4, 4)])
def test_number_of_phis(phis: int, count: int) -> None:
    quantizer = MultiscaleQuantizer(replace(TOY, phis=phis))
    assert len(quantizer.phis) == count
    assert {id(phi) for phi in quantizer.space().phis} == {id(phi) for phi in quantizer.phis}


def test_released_ties_and_the_rule_that_made_them() -> None:
    """Scales 2 and 7 of ten lie half-way between two of four ticks, up to the last bit."""
    ticks = [1 / 12, 13 / 36, 23 / 36, 11 / 12]
    for scale, (low, high) in ((2, (0, 1)), (7, (2, 3))):
        assert abs(scale / 9 - ticks[low]) == pytest.approx(abs(scale / 9 - ticks[high]), abs=1e-15)
    assert RELEASED_PHIS[10, 4] == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    released = MultiscaleQuantizer(MultiscaleConfig())
    assert [next(i for i, phi in enumerate(released.phis) if phi is used) for used in released.space().phis] == list(
        RELEASED_PHIS[10, 4])


@pytest.mark.parametrize(("scales", "phis", "expected"), [
    (1, 4, [0]), (3, 2, [0, 0, 1]), (5, 5, [0, 1, 2, 3, 4]), (4, 4, [0, 1, 2, 3]), (5, 1, [0] * 5),
    (5, 2, [0, 0, 0, 1, 1]),
])
def test_nearest_tick(scales: int, phis: int, expected: list[int]) -> None:
    assert [phi_of_scale(k, scales, phis) for k in range(scales)] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Codebook


def test_z_norm_compares_directions_and_keeps_lengths() -> None:
    codebook_VC = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    latents_BLC = torch.tensor([[[0.1, 1.0], [2.0, 1.0]]])
    assert plain_space(codebook_VC, 1, z_norm=True).nearest(latents_BLC).tolist() == [[1, 0]]
    assert plain_space(codebook_VC, 1).nearest(latents_BLC).tolist() == [[1, 1]]
    _, maps = plain_space(codebook_VC, 1, z_norm=True).quantise(torch.tensor([3.0, 1.0]).view(1, 2, 1, 1))
    assert maps[0].flatten().tolist() == [10.0, 0.0]


def test_defect_5_nearest_never_holds_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """DD1's released search builds (V, B, L, C): 23 GB for VAR at batch 64."""
    largest = 0
    addmm = torch.addmm

    def watched(*arguments: Tensor, **options: float) -> Tensor:
        nonlocal largest
        result = addmm(*arguments, **options)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(vq, "_CHUNK", 8)
    monkeypatch.setattr(torch, "addmm", watched)
    codebook_VC, latents_BLC = torch.randn(50, 4, generator=seeded()), torch.randn(3, 40, 4, generator=seeded(1))
    codes_BL = plain_space(codebook_VC, 1).nearest(latents_BLC)
    assert 0 < largest <= 8 * 50
    assert torch.equal(codes_BL, torch.cdist(latents_BLC, codebook_VC).argmin(-1))


# ---------------------------------------------------------------------------------------------------------------------
# Vectors that are no codes; training


def test_gradients_reach_vectors_of_any_scale() -> None:
    space = toy().space()
    latents_BLC = torch.randn(1, LENGTH, 4, generator=seeded(), requires_grad=True)
    maps = space.maps(latents_BLC)
    (gradient,) = torch.autograd.grad(space.next_input(maps[1], 2).sum(), latents_BLC)
    assert gradient[:, :5].abs().sum(-1).min() > 0 and not gradient[:, 5:].any()
    assert not space.codebook_VC.requires_grad


def test_training_pass_is_straight_through_with_the_loss_of_the_code() -> None:
    tokenizer = toy(replace(TOY, commit_beta=0.5))
    f_BChw = torch.randn(2, 4, 4, 4, generator=seeded(), requires_grad=True)
    through_BChw, codes_BL, losses = tokenizer.quantize(f_BChw)
    expected_BL, maps = tokenizer.space().quantise(f_BChw)
    assert torch.equal(codes_BL, expected_BL)
    torch.testing.assert_close(through_BChw, maps[-1])
    distance = torch.stack([F.mse_loss(one, f_BChw) for one in maps]).mean()
    torch.testing.assert_close(losses.vq, distance)
    torch.testing.assert_close(losses.commit, 0.5 * distance)
    (through,) = torch.autograd.grad(through_BChw.sum(), f_BChw, retain_graph=True)
    assert torch.equal(through, torch.ones_like(through))
    (commit,) = torch.autograd.grad(losses.commit, f_BChw, retain_graph=True)
    torch.testing.assert_close(commit, 0.5 * 2 * (f_BChw - torch.stack(maps).mean(0)) / f_BChw.numel())
    for name, parameter in tokenizer.quantize.named_parameters():
        gradients = [torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)[0]
                     for loss in (losses.vq, losses.commit) if loss.requires_grad]
        assert gradients[0] is not None and gradients[1] is None, name


def test_tokenizer_trains_without_a_process_group() -> None:
    tokenizer = toy().train()
    recon_B3HW, codes_BL, losses = tokenizer(images())
    (F.mse_loss(recon_B3HW, images()) + losses.vq + losses.commit + losses.entropy).backward()
    assert recon_B3HW.shape == (2, 3, 8, 8) and codes_BL.shape == (2, LENGTH)
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Precision, checkpoints, errors


@torch.no_grad()
def test_precision() -> None:
    codes_BL = torch.zeros(1, LENGTH, dtype=torch.int64)
    assert toy().bfloat16().space().codebook_VC.dtype == torch.float32
    assert toy().bfloat16().lookup(codes_BL, (4, 4)).dtype == torch.float32
    assert toy().bfloat16().decode_codes(codes_BL, (4, 4)).dtype == torch.bfloat16
    assert toy().double().decode_codes(codes_BL, (4, 4)).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        through_BChw, _, losses = toy()(images())
    assert losses.vq.dtype == torch.float32


@torch.no_grad()
def test_round_trip(tmp_path: Path) -> None:
    tokenizer = toy()
    save_component(tokenizer, tmp_path / "tokenizer")
    loaded = load_component(tmp_path / "tokenizer")
    assert isinstance(loaded, MultiscaleTokenizer) and loaded.config == TOY
    assert torch.equal(loaded.encode(images()).codes_BL, tokenizer.encode(images()).codes_BL)


@pytest.mark.parametrize(("changes", "message"), [
    ({"scales": ()}, r"scales=\[\]: give \(h, w\) pairs of positive sides, from coarse to fine"),
    ({"scales": ((2, 2), (1, 1))}, "from coarse to fine"),
    ({"scales": ((0, 1), (4, 4))}, "positive sides"),
    ({"phis": -1}, "phis=-1: must be from 0"),
    ({"conv_kernel": 2}, "conv_kernel=2: an even kernel"),
    ({"base_channels": 40}, "group norm needs multiples of 32"),
])
def test_config_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TOY, **changes)


def test_input_errors() -> None:
    tokenizer = toy()
    with pytest.raises(InputError, match="image size 9x9: both sides must be multiples of 2"):
        tokenizer.encode(images(9))
    with pytest.raises(InputError, match="a map of 6x6 tokens; the scales 1x1, 2x2, 3x3, 4x4 need one as large"):
        tokenizer.encode(images(12))
    with pytest.raises(InputError, match="7 tokens; the scales 1x1, 2x2, 3x3, 4x4 hold 30"):
        tokenizer.decode_codes(torch.zeros(1, 7, dtype=torch.int64), (4, 4))
    with pytest.raises(InputError, match="grid 5x5: the scales 1x1, 2x2, 3x3, 4x4 end elsewhere"):
        tokenizer.decode_codes(torch.zeros(1, LENGTH, dtype=torch.int64), (5, 5))
    with pytest.raises(InputError, match="from coarse to fine"):
        tokenizer.space(((3, 3), (2, 2)))


@pytest.mark.parametrize("pixels", [512, 1024])
def test_released_scale_lists_of_larger_images(pixels: int) -> None:
    """Codes of all scales to f_hat at the sizes of the paper, with few channels."""
    scales = square_scales(VAR_SIDES[pixels])
    quantizer = MultiscaleQuantizer(replace(TOY, scales=scales))
    codes_BL = torch.randint(24, (1, sum(side ** 2 for side in VAR_SIDES[pixels])), generator=seeded())
    space = quantizer.space()
    with torch.no_grad():
        maps = space.maps(space.codebook_VC[codes_BL])
    assert len(maps) == len(scales) and maps[-1].shape == (1, 4, *scales[-1])
