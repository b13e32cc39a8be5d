"""MAR's KL autoencoder: ours, and the same weights in diffusers' AutoencoderKL."""

from __future__ import annotations

from dataclasses import replace

import torch

from arimg.interop.kl import from_diffusers, infer_kl_config, kl_config_from_mar, kl_from_ldm, to_diffusers
from arimg.tokenizers.kl import KLTokenizer, Posterior
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    tokenizer = build(fixture)
    check_network(fixture, tokenizer)
    if tokenizer.config.multipliers[0] == 1:        # diffusers has no others
        check_network(fixture, from_diffusers(to_diffusers(tokenizer)))
        check_diffusers(fixture, tokenizer)
    posterior = Posterior.from_moments(fixture["in.raw_moments"])
    fixture.compare("out.raw_std", posterior.std_BChw)
    fixture.compare("out.raw_kl", posterior.kl())
    fixture.compare("out.raw_nll", posterior.nll(fixture["in.nll_sample"]))


def build(fixture: Fixture) -> KLTokenizer:
    """The tokenizer of the fixture's config with its weights, whose shapes tell the same sizes."""
    config, state = kl_config_from_mar(fixture.spec["config"]), fixture.state_dict()
    assert config == replace(infer_kl_config(state), scale=config.scale)
    tokenizer = KLTokenizer(config)
    tokenizer.load_state_dict(kl_from_ldm(state))
    return tokenizer.eval()


def check_network(fixture: Fixture, tokenizer: KLTokenizer) -> None:
    """Encode with and without the given noise; decode."""
    images, scale = fixture["in.x"], tokenizer.config.scale
    posterior = tokenizer.posterior(images)
    latents_BChw = tokenizer.encode(images, fixture["in.eps"])
    fixture.compare("out.moments", tokenizer.moments(images))
    fixture.compare("out.mean", posterior.mean_BChw)
    fixture.compare("out.logvar", posterior.log_variance_BChw)
    fixture.compare("out.latent_scaled", latents_BChw)
    fixture.compare("out.decoded", tokenizer.decode(fixture["in.z"] * scale))
    fixture.compare("out.decoded_roundtrip", tokenizer.decode(latents_BChw))


def check_diffusers(fixture: Fixture, tokenizer: KLTokenizer) -> None:
    """The network that to_diffusers gives."""
    autoencoder = to_diffusers(tokenizer)
    posterior = autoencoder.encode(fixture["in.x"]).latent_dist
    fixture.compare("out.moments", posterior.parameters)
    fixture.compare("out.mean", posterior.mean)
    fixture.compare("out.logvar", posterior.logvar)
    fixture.compare("out.decoded", autoencoder.decode(fixture["in.z"]).sample)
