"""LlamaGen's PatchGAN: logits in eval mode and the losses of both sides."""

from __future__ import annotations

import torch

from arimg.tokenizers.losses import GAN_LOSSES, PatchDiscriminator
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare the logits of `in.real` and `in.fake`, and every stored loss."""
    spec = fixture.spec["config"]
    discriminator = PatchDiscriminator(spec["in_channels"], spec["ndf"], spec["n_layers"]).eval()
    discriminator.load_state_dict(fixture.state_dict())
    real, fake = discriminator(fixture["in.real"]), discriminator(fixture["in.fake"])
    got = {"out.logits_real": real, "out.logits_fake": fake}
    for name, loss in GAN_LOSSES.items():
        got |= {f"out.{name}_d": loss.discriminator(real, fake), f"out.{name}_g": loss.generator(fake)}
    for name in got.keys() & fixture.tensors.keys():
        fixture.compare(name, got[name])
