"""The VQ tokenizer: shapes, quantiser, losses, codebook bookkeeping, LlamaGen's sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.errors import ConfigError, InputError
from arimg.tokenizers import vq
from arimg.tokenizers.vq import CodebookUsage, VectorQuantizer, VQConfig, VQTokenizer, entropy_loss, nearest_code

TOY = VQConfig(codebook_size=24, codebook_dim=4, base_channels=32, multipliers=(1, 1, 2), res_blocks=1, z_channels=16)
VQ16 = VQConfig()
VQ8 = VQConfig(multipliers=(1, 2, 2, 4))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(config: VQConfig = TOY) -> VQTokenizer:
    """A random tokenizer with well separated codes."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config).eval()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.normal_()
    return tokenizer


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded()) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Images and codes


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (4, 4)])
@torch.no_grad()
def test_shapes_of_any_grid(height: int, width: int) -> None:
    tokenizer = toy()
    encoded = tokenizer.encode(images(height, width))
    grid = (height // 4, width // 4)
    assert tokenizer.stride == 4 and encoded.grid == grid
    assert encoded.codes_BL.shape == (2, grid[0] * grid[1]) and encoded.codes_BL.dtype == torch.int64
    assert encoded.latents_BChw.shape == (2, 4, *grid)
    assert tokenizer.decode(encoded.latents_BChw).shape == (2, 3, height, width)


@pytest.mark.parametrize("l2_norm", [True, False])
@torch.no_grad()
def test_codes_and_latents_decode_alike(l2_norm: bool) -> None:
    tokenizer = toy(replace(TOY, l2_norm=l2_norm))
    encoded = tokenizer.encode(images(12, 20))
    assert torch.equal(tokenizer.decode(encoded.latents_BChw), tokenizer.decode_codes(encoded.codes_BL, encoded.grid))


@torch.no_grad()
def test_a_decoder_of_other_widths() -> None:
    tokenizer = toy(replace(TOY, multipliers=(1, 1, 2), decoder_multipliers=(2, 1, 3)))
    assert tokenizer.encoder.norm_out.num_channels == 64 and tokenizer.decoder.conv_in.out_channels == 96
    assert tokenizer.decoder.norm_out.num_channels == 64
    encoded = tokenizer.encode(images(12, 20))
    assert tokenizer.decode(encoded.latents_BChw).shape == (2, 3, 12, 20)
    with pytest.raises(ConfigError, match=r"decoder_multipliers=\[1\]: the encoder has 3 levels"):
        replace(TOY, decoder_multipliers=(1,))


@torch.no_grad()
def test_codes_are_in_raster_order() -> None:
    tokenizer = toy()
    codes_BL = torch.arange(6)[None]
    latents_BChw = tokenizer.lookup(codes_BL, (2, 3))
    codebook_VC = tokenizer.space().codebook_VC
    assert torch.equal(latents_BChw[0, :, 1, 2], codebook_VC[5])
    assert torch.equal(latents_BChw[0, :, 0, 1], codebook_VC[1])


@torch.no_grad()
def test_images_of_a_batch_do_not_meet() -> None:
    tokenizer = toy()
    batch = images(16, 16, batch=3)
    alone = torch.cat([tokenizer.encode(image[None]).codes_BL for image in batch])
    assert torch.equal(tokenizer.encode(batch).codes_BL, alone)


@torch.no_grad()
def test_patch_size_multiplies_the_stride() -> None:
    tokenizer = toy(replace(TOY, patch_size=2, multipliers=(1, 2)))
    encoded = tokenizer.encode(images(8, 12))
    assert tokenizer.stride == 4 and encoded.grid == (2, 3)
    assert tokenizer.encoder.conv_in.in_channels == 12 and tokenizer.decoder.conv_out.out_channels == 12
    assert tokenizer.decode_codes(encoded.codes_BL, encoded.grid).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(("height", "width", "nearest"), [(18, 16, "16x16"), (16, 23, "16x24"), (1, 2, "4x4")])
def test_size_that_is_no_multiple(height: int, width: int, nearest: str) -> None:
    with pytest.raises(InputError) as error:
        toy().encode(images(height, width))
    assert str(error.value) == (f"image size {height}x{width}: both sides must be multiples of 4; "
                                f"the nearest is {nearest}")


def test_widths_that_group_norm_cannot_take() -> None:
    with pytest.raises(ConfigError, match=r"base_channels=48.*\[48, 48, 96\].*multiples of 32"):
        VQConfig(base_channels=48, multipliers=(1, 2))


@pytest.mark.parametrize(("config", "parameters", "entries"), [(VQ16, 71_883_403, 344), (VQ8, 70_109_835, 300)])
def test_sizes_of_the_released_tokenizers(config: VQConfig, parameters: int, entries: int) -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters
    assert len(tokenizer.state_dict()) == entries - 1       # theirs also holds the queue of recent codes
    assert tokenizer.stride == (16 if config is VQ16 else 8)


def test_state_dict_layout_of_vq16() -> None:
    with torch.device("meta"):
        state = VQTokenizer(VQ16).state_dict()
    assert [key for key in state if "nin_shortcut.weight" in key] == [
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight", "encoder.conv_blocks.4.res.0.nin_shortcut.weight",
        "decoder.conv_blocks.1.res.0.nin_shortcut.weight", "decoder.conv_blocks.3.res.0.nin_shortcut.weight"]
    assert {key.split(".attn")[0] for key in state if ".attn." in key} == {"encoder.conv_blocks.4",
                                                                           "decoder.conv_blocks.0"}
    assert state["encoder.conv_out.weight"].shape == (256, 512, 3, 3)
    assert state["decoder.conv_in.weight"].shape == (512, 256, 3, 3)
    assert state["quantize.embedding.weight"].shape == (16384, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Quantiser


@pytest.mark.parametrize("count", [1, 7, vq._CHUNK, 2 * vq._CHUNK + 3])
def test_nearest_code_equals_brute_force(count: int) -> None:
    z_NC = torch.randn(count, 5, generator=seeded(1), dtype=torch.float64)
    codebook_VC = torch.randn(11, 5, generator=seeded(2), dtype=torch.float64)
    assert torch.equal(nearest_code(z_NC, codebook_VC), torch.cdist(z_NC, codebook_VC).argmin(1))


def test_nearest_code_under_autocast_is_float32() -> None:
    """The two codes differ by less than bfloat16 can tell."""
    codebook_VC = torch.tensor([[1.0, 0.0], [1.001, 0.0]])
    z_NC = torch.tensor([[1.002, 0.0], [0.999, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_code(z_NC, codebook_VC).tolist() == [1, 0]


def test_space_is_the_codebook_that_decoders_see() -> None:
    space = toy().space()
    assert space.scales is None and space.codebook_VC.dtype == torch.float32
    torch.testing.assert_close(space.codebook_VC.norm(dim=1), torch.ones(24))
    codes_BL = torch.tensor([[3, 0, 23], [5, 5, 1]])
    assert torch.equal(space.nearest(space.codebook_VC[codes_BL] + 0.01), codes_BL)


def test_gradient_goes_straight_through() -> None:
    quantizer = VectorQuantizer(replace(TOY, l2_norm=False))
    z_BChw = torch.randn(2, 4, 3, 3, generator=seeded(), requires_grad=True)
    weights = torch.randn(2, 4, 3, 3, generator=seeded(1))
    (quantizer(z_BChw)[0] * weights).sum().backward()
    assert z_BChw.grad is not None
    torch.testing.assert_close(z_BChw.grad, weights)
    assert quantizer.embedding.weight.grad is None


def test_losses_by_hand() -> None:
    """Latent 0.5 lies at distance 0.5 of code 0 and 1.5 of code 2: both losses are 0.25, weighted 1 and beta."""
    quantizer = VectorQuantizer(VQConfig(codebook_size=2, codebook_dim=1, l2_norm=False, commit_beta=0.5))
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0], [2.0]]))
    z_BChw = torch.full((1, 1, 1, 1), 0.5, requires_grad=True)
    _, codes_BL, losses = quantizer(z_BChw)
    assert codes_BL.tolist() == [[0]]
    assert (losses.vq.item(), losses.commit.item(), losses.entropy.item()) == (0.25, 0.125, 0.0)
    losses.vq.backward(retain_graph=True)
    assert z_BChw.grad is None and quantizer.embedding.weight.grad.tolist() == [[-1.0], [0.0]]
    losses.commit.backward()
    assert z_BChw.grad.item() == 0.5                                            # type: ignore[union-attr]


def test_entropy_is_lowest_when_sure_and_spread() -> None:
    """Latents on V orthogonal codes: no doubt per sample, all codes in equal use, so the loss is -log V."""
    codebook_VC = torch.eye(4)
    assert entropy_loss(codebook_VC, codebook_VC).item() == pytest.approx(-math.log(4), abs=1e-3)
    between_NC = torch.full((3, 2), 0.5)        # as far from either code: log 2 per sample, log 2 for the mean
    assert entropy_loss(between_NC, torch.eye(2)).item() == pytest.approx(0, abs=1e-3)


def test_defect_07_entropy_is_not_computed_at_ratio_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(z_NC: Tensor, codebook_VC: Tensor) -> Tensor:
        calls.append(len(z_NC))
        return entropy_loss(z_NC, codebook_VC)

    monkeypatch.setattr(vq, "entropy_loss", counted)
    toy()(images(8, 8))
    assert not calls
    _, _, losses = toy(replace(TOY, entropy_ratio=0.1))(images(8, 8))
    assert calls == [8] and losses.entropy.item() != 0


def test_defect_02_training_forward_on_cpu() -> None:
    """In the original the queue of recent codes required gradients, so that a training pass on the CPU raised."""
    tokenizer = toy().train()
    batch = images(12, 20)
    recon_B3HW, codes_BL, losses = tokenizer(batch)
    assert recon_B3HW.shape == batch.shape and codes_BL.shape == (2, 15)
    (F.mse_loss(recon_B3HW, batch) + losses.vq + losses.commit + losses.entropy).backward()
    assert not [name for name, parameter in tokenizer.named_parameters() if parameter.grad is None]
    usage = CodebookUsage(tokenizer.vocab_size)
    usage.update(codes_BL)
    assert not usage.recent.requires_grad


def test_training_forward_in_double_and_under_autocast() -> None:
    batch = images(8, 12)
    double = toy(replace(TOY, entropy_ratio=0.1)).double()
    recon_B3HW, codes_BL, losses = double(batch.double())
    assert recon_B3HW.dtype == losses.vq.dtype == losses.entropy.dtype == torch.float64
    tokenizer = toy(replace(TOY, entropy_ratio=0.1))
    torch.testing.assert_close(tokenizer(batch)[0].double(), recon_B3HW, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        recon_B3HW, _, losses = tokenizer(batch)
    assert losses.vq.dtype == losses.commit.dtype == losses.entropy.dtype == torch.float32
    (recon_B3HW.float().mean() + losses.vq + losses.commit + losses.entropy).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


def test_training_and_encoding_agree() -> None:
    tokenizer = toy()
    recon_B3HW, codes_BL, _ = tokenizer(images(16, 16))
    encoded = tokenizer.encode(images(16, 16))
    assert torch.equal(codes_BL, encoded.codes_BL)
    torch.testing.assert_close(recon_B3HW, tokenizer.decode(encoded.latents_BChw), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Codebook in use


def test_usage_counts_the_last_codes() -> None:
    usage = CodebookUsage(codebook_size=8, window=4)
    assert usage.dead().all()
    assert usage.update(torch.tensor([[0, 1], [1, 0]])) == pytest.approx(2 / 8)
    assert usage.update(torch.tensor([5, 6, 7])) == pytest.approx(4 / 8)        # one 0 is left in the window
    assert usage.dead().tolist() == [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_dead_codes_move_onto_latents(l2_norm: bool) -> None:
    quantizer = VectorQuantizer(replace(TOY, l2_norm=l2_norm))
    before_VC = quantizer.embedding.weight.detach().clone()
    z_BChw = torch.randn(2, 4, 3, 3, generator=seeded())
    dead_V = torch.zeros(24, dtype=torch.bool)
    dead_V[[2, 9, 20]] = True
    assert quantizer.revive(z_BChw, dead_V, seeded(1)) == 3
    after_VC = quantizer.embedding.weight.detach()
    assert torch.equal(after_VC[~dead_V], before_VC[~dead_V])
    latents_NC = quantizer.normalise(z_BChw.movedim(1, -1)).flatten(0, 2)
    assert torch.cdist(after_VC[dead_V], latents_NC).min(1).values.max() < 1e-3
    assert len(after_VC[dead_V].unique(dim=0)) == 3
    assert set(quantizer(z_BChw)[1].flatten().tolist()) >= {2, 9, 20}


def test_more_dead_codes_than_latents() -> None:
    quantizer = VectorQuantizer(TOY)
    dead_V = torch.ones(24, dtype=torch.bool)
    assert quantizer.revive(torch.randn(1, 4, 2, 3, generator=seeded()), dead_V, seeded(1)) == 6
    assert quantizer.revive(torch.randn(1, 4, 2, 3, generator=seeded()), ~dead_V, seeded(1)) == 0
