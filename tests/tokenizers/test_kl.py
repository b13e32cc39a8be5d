"""The KL autoencoder: its Gaussian, scale, patches, noise, errors, and diffusers' AutoencoderKL."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arimg.checkpoints import load_component, save_component
from arimg.errors import CheckpointError, ConfigError, InputError
from arimg.interop.kl import from_diffusers, to_diffusers
from arimg.tokenizers.kl import KLConfig, KLTokenizer, Posterior

TOY = KLConfig(base_channels=32, multipliers=(1, 2), res_blocks=1, latent_channels=4, attention_levels=(1,))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(config: KLConfig = TOY) -> KLTokenizer:
    torch.manual_seed(0)
    return KLTokenizer(config).eval()


def images(height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded()) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian


def test_posterior_by_hand() -> None:
    moments_BChw = torch.tensor([2.0, 2 * math.log(3.0)]).view(1, 2, 1, 1)
    posterior = Posterior.from_moments(moments_BChw)
    one = torch.ones(1, 1, 1, 1)
    assert posterior.std_BChw.item() == pytest.approx(3)
    assert posterior.sample(-one).item() == pytest.approx(-1)
    assert posterior.kl().item() == pytest.approx(0.5 * (4 + 9 - 1 - math.log(9)))
    assert posterior.nll(5 * one).item() == pytest.approx(0.5 * (math.log(2 * math.pi * 9) + 1))


def test_posterior_against_torch() -> None:
    moments_BChw, x_BChw = torch.randn(2, 3, 6, 4, 4, generator=seeded()).unbind(0)
    posterior = Posterior.from_moments(moments_BChw)
    normal = torch.distributions.Normal(posterior.mean_BChw, posterior.std_BChw)
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(posterior.nll(x_BChw[:, :3]), -normal.log_prob(x_BChw[:, :3]).sum((1, 2, 3)))
    expected = torch.distributions.kl_divergence(normal, standard).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)


def test_log_variance_is_clamped_at_both_ends() -> None:
    posterior = Posterior.from_moments(torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1))
    assert posterior.log_variance_BChw.flatten().tolist() == [-30.0, 20.0]
    assert posterior.kl().isfinite().all() and posterior.nll(torch.ones(1, 2, 1, 1)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@torch.no_grad()
def test_encode_is_the_mean_or_a_sample_times_the_scale() -> None:
    tokenizer = toy(replace(TOY, scale=0.5))
    posterior, noise_BChw = tokenizer.posterior(images()), torch.randn(2, 4, 4, 4, generator=seeded())
    torch.testing.assert_close(tokenizer.encode(images()), 0.5 * posterior.mean_BChw)
    torch.testing.assert_close(tokenizer.encode(images(), noise_BChw), 0.5 * posterior.sample(noise_BChw))


@torch.no_grad()
def test_decode_undoes_the_scale() -> None:
    tokenizer = toy()
    tokens_BChw = tokenizer.encode(images(8, 12))
    expected = tokenizer.decoder(tokenizer.post_quant_conv(tokens_BChw / 0.2325))
    assert tokens_BChw.shape == (2, 4, 4, 6) and torch.equal(tokenizer.decode(tokens_BChw), expected)
    assert expected.shape == (2, 3, 8, 12)


@torch.no_grad()
def test_patches_are_another_order_of_the_same_latents() -> None:
    """Numbers of a token: channel, row, column, as MAR's patchify."""
    plain, patched = toy(), toy(replace(TOY, patch_size=2))
    tokens_BChw = patched.encode(images())
    assert patched.stride == 4 and patched.token_channels == 16 and tokens_BChw.shape == (2, 16, 2, 2)
    latents_BChw = plain.encode(images())
    assert tokens_BChw[1, 4 * 3 + 2 * 1 + 0, 1, 0] == latents_BChw[1, 3, 2 + 1, 0]
    assert torch.equal(patched.decode(tokens_BChw), plain.decode(latents_BChw))


@torch.no_grad()
def test_counter_noise_depends_on_seed_and_position_alone() -> None:
    tokenizer = toy()
    noise_BChw = tokenizer.noise(torch.tensor([3, 4]), (4, 4))
    assert noise_BChw.shape == (2, 4, 4, 4) and not torch.equal(noise_BChw[0], noise_BChw[1])
    assert torch.equal(tokenizer.noise(torch.tensor([4]), (4, 4))[0], noise_BChw[1])
    assert torch.equal(tokenizer.noise(torch.tensor([4]), (2, 4))[0], noise_BChw[1, :, :2])
    many = toy(replace(TOY, latent_channels=16)).noise(torch.arange(64), (8, 8))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


@torch.no_grad()
def test_images_of_a_batch_do_not_meet() -> None:
    tokenizer, seeds_B = toy(), torch.tensor([5, 6, 7])
    together = tokenizer.encode(images(batch=3), tokenizer.noise(seeds_B, (4, 4)))
    alone = [tokenizer.encode(image[None], tokenizer.noise(seed[None], (4, 4)))
             for image, seed in zip(images(batch=3), seeds_B)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_training_pass() -> None:
    tokenizer = toy().train()
    recon_B3HW, posterior = tokenizer(images(), torch.randn(2, 4, 4, 4, generator=seeded()))
    ((recon_B3HW - images()).square().mean() + 1e-6 * posterior.kl().mean()).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def test_attention_stands_where_it_is_asked_for() -> None:
    config = KLConfig(base_channels=32, multipliers=(1, 1, 1), res_blocks=1, attention_levels=(0, 2),
                      decoder_attention_levels=(1,))
    attended = {key.split(".attn.")[0] for key in KLTokenizer(config).state_dict() if ".attn." in key}
    assert attended == {"encoder.conv_blocks.0", "encoder.conv_blocks.2", "decoder.conv_blocks.1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_precision(dtype: torch.dtype) -> None:
    tokenizer = toy().to(dtype)
    tokens_BChw = tokenizer.encode(images().to(dtype), tokenizer.noise(torch.arange(2), (4, 4)))
    assert tokens_BChw.dtype == dtype and tokenizer.decode(tokens_BChw.float()).dtype == dtype


@torch.no_grad()
def test_round_trip(tmp_path: Path) -> None:
    tokenizer = toy()
    save_component(tokenizer, tmp_path / "tokenizer")
    loaded = load_component(tmp_path / "tokenizer")
    assert isinstance(loaded, KLTokenizer) and loaded.config == TOY and loaded.space() is None
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


@pytest.mark.parametrize("config", [TOY, replace(TOY, attention_levels=(), decoder_attention_levels=(0, 1))])
@torch.no_grad()
def test_diffusers_has_the_same_numbers(config: KLConfig) -> None:
    tokenizer = toy(config)
    autoencoder = to_diffusers(tokenizer)
    assert autoencoder.config.scaling_factor == 0.2325 and not autoencoder.training
    latents_BChw = autoencoder.encode(images()).latent_dist.mean
    torch.testing.assert_close(0.2325 * latents_BChw, tokenizer.encode(images()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(autoencoder.decode(latents_BChw).sample, tokenizer.decode(0.2325 * latents_BChw),
                               rtol=1e-4, atol=1e-5)
    back = from_diffusers(autoencoder)
    assert back.config == config
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in tokenizer.state_dict().items())


def test_what_diffusers_does_not_have() -> None:
    for config in (replace(TOY, patch_size=2), replace(TOY, multipliers=(2, 2))):
        with pytest.raises(ConfigError, match="both must be 1"):
            to_diffusers(toy(config))


def test_what_diffusers_alone_has() -> None:
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (32,), "layers_per_block": 1, "latent_channels": 4}
    with pytest.raises(CheckpointError, match="post_quant_conv.*differs from Stable Diffusion's network"):
        from_diffusers(AutoencoderKL(**sizes, use_quant_conv=False, use_post_quant_conv=False))
    with pytest.raises(CheckpointError, match="its group norm differs"):
        from_diffusers(AutoencoderKL(**sizes, norm_num_groups=16))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(("changes", "message"), [
    ({"base_channels": 48}, "group norm needs multiples of 32"),
    ({"attention_levels": (2,)}, r"attention_levels=\[2\]: the levels are 0 to 1"),
    ({"decoder_attention_levels": (-1,)}, r"decoder_attention_levels=\[-1\]: the levels are 0 to 1"),
    ({"patch_size": 0}, "patch_size=0: must be from 1"), ({"scale": 0.0}, "scale=0.0: must be positive"),
])
def test_config_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TOY, **changes)


def test_input_errors() -> None:
    with pytest.raises(InputError, match="image size 7x8: both sides must be multiples of 2"):
        toy().encode(images(7, 8))
    with pytest.raises(InputError, match=r"noise of shape \(2, 4, 2, 2\); give one of \(2, 4, 4, 4\)"):
        toy().encode(images(), torch.zeros(2, 4, 2, 2))
