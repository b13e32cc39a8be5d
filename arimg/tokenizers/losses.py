"""Losses on reconstructed images: pixels, deep features, an adversary (LlamaGen section 2.1; Esser et al. 2021).

Images are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import CheckpointError, ConfigError, UnknownNameError
from arimg.features import VGG16, EffnetLite0, FixedNetwork
from arimg.tokenizers.vq import VQLosses
from arimg.weights import read_weights

# ---------------------------------------------------------------------------------------------------------------------
# Perceptual distance


class PerceptualLoss(nn.Module):
    """Distance of deep features (Zhang et al. 2018, eq. 1): unit-length features of each pixel, squared difference,
    weighted per channel, averaged over the pixels, summed over the layers.

    network: gives a list of maps. heads: channel weights (C,) per map; None = all ones.
    """

    def __init__(self, network: FixedNetwork, heads: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self.weighted = heads is not None
        for index, head_C in enumerate(heads or ()):
            self.register_buffer(f"head{index}", head_C.detach().float().view(-1, 1, 1), persistent=False)

    def forward(self, images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
        """Distances (B,), symmetric and not negative."""
        distance_B = images_B3HW.new_zeros(len(images_B3HW), dtype=torch.float32)
        for index, (a, b) in enumerate(zip(self.network(images_B3HW), self.network(targets_B3HW))):
            difference = (F.normalize(a.float(), eps=1e-10) - F.normalize(b.float(), eps=1e-10)).square()
            if self.weighted:
                difference = difference * self.get_buffer(f"head{index}")
            distance_B = distance_B + difference.sum(1).mean((1, 2))
        return distance_B


def lpips_vgg16(vgg_file: Path, heads_file: Path) -> PerceptualLoss:
    """LPIPS 0.1 on VGG-16, without the dropout of its heads, which is off wherever a distance is measured.

    vgg_file: VGG-16 in torchvision's layout (vgg16-397923af.pth). heads_file: the five linear heads in LPIPS's layout
    (vgg.pth: `lin0.model.1.weight` (1, 64, 1, 1), ..., `lin4.model.1.weight`). Raises CheckpointError.
    """
    state = read_weights(heads_file)
    keys = [f"lin{index}.model.1.weight" for index in range(len(VGG16.channels))]
    for key, channels in zip(keys, VGG16.channels):
        if key not in state or state[key].shape != (1, channels, 1, 1):
            found = f"of shape {tuple(state[key].shape)}" if key in state else "missing"
            raise CheckpointError(f"LPIPS heads {str(heads_file)!r}: {key} is {found}, but (1, {channels}, 1, 1) is "
                                  "needed; give the file vgg.pth of LPIPS 0.1")
    return PerceptualLoss(VGG16.from_file(vgg_file), [state[key].flatten() for key in keys])


def effnet_loss() -> PerceptualLoss:
    """The same distance on EfficientNet-Lite0, unweighted: its weights need no download. Raises MissingExtraError."""
    return PerceptualLoss(EffnetLite0())


# ---------------------------------------------------------------------------------------------------------------------
# Adversary


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): a logit per overlapping patch. State-dict keys are LlamaGen's."""

    def __init__(self, in_channels: int = 3, base_channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [base_channels * min(2 ** level, 8) for level in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            blocks += [nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=False),
                       nn.BatchNorm2d(widths[level]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, 1, h, w): high for real. h is H / 2**layers - 2."""
        return self.main(images_B3HW)


@dataclass(frozen=True)
class GANLoss:
    """Both sides of a game, as functions of the discriminator's logits of any shape."""

    discriminator: Callable[[Tensor, Tensor], Tensor]       # (real, fake)
    generator: Callable[[Tensor], Tensor]                   # (fake)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(E max(0, 1 - D(x)) + E max(0, 1 + D(G))) / 2 (Lim & Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(G)."""
    return -fake.mean()


def vanilla_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy with targets real 1 and fake 0, from logits (Goodfellow et al. 2014, eq. 1), halved."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def vanilla_generator(fake: Tensor) -> Tensor:
    """-E log sigmoid(D(G)), the non-saturating form (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


GAN_LOSSES = {
    "hinge": GANLoss(hinge_discriminator, hinge_generator),
    "vanilla": GANLoss(vanilla_discriminator, vanilla_generator),
}


# ---------------------------------------------------------------------------------------------------------------------
# Both sides, as they are trained


@dataclass(frozen=True)
class ImageLossConfig:
    """Weights of the losses, 0 = not computed; the defaults are LlamaGen's."""

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5            # of the generator's and of the discriminator's loss
    gan: str = "hinge"                  # hinge | vanilla
    start_step: int = 20000             # first optimiser step with an adversary, on both sides

    def __post_init__(self) -> None:
        if self.gan not in GAN_LOSSES:
            raise UnknownNameError("GAN loss", self.gan, GAN_LOSSES)
        for name in ("l1", "l2", "perceptual", "adversarial", "start_step"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"loss.{name}={getattr(self, name)}: must be a finite number from 0 on")


class TokenizerLoss(nn.Module):
    """The losses of a tokenizer without an adversary.

    perceptual: network, needed where its weight is not 0. Raises ConfigError when it is missing.
    """

    def __init__(self, config: ImageLossConfig, perceptual: PerceptualLoss | None = None) -> None:
        super().__init__()
        if config.perceptual and perceptual is None:
            raise ConfigError(f"perceptual={config.perceptual:g} needs a network and none was given; give one, or set "
                              "perceptual=0")
        self.config = config
        self.perceptual = perceptual

    def forward(self, recon_B3HW: Tensor, images_B3HW: Tensor, quantiser: VQLosses) -> Tensor:
        """Scalar loss of the tokenizer."""
        config = self.config
        loss = quantiser.vq + quantiser.commit + quantiser.entropy
        if config.l1:
            loss = loss + config.l1 * F.l1_loss(recon_B3HW, images_B3HW)
        if config.l2:
            loss = loss + config.l2 * F.mse_loss(recon_B3HW, images_B3HW)
        if config.perceptual and self.perceptual is not None:
            loss = loss + config.perceptual * self.perceptual(recon_B3HW, images_B3HW).mean()
        return loss


class Adversary(nn.Module):
    """A discriminator and both sides' losses in the game against it, with their weight."""

    def __init__(self, config: ImageLossConfig, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.config = config
        self.discriminator = discriminator
        self.game = GAN_LOSSES[config.gan]

    def plays(self, step: int) -> bool:
        """Whether there is an adversary at optimiser step `step`, on both sides: before, nothing is to be computed."""
        return bool(self.config.adversarial) and step >= self.config.start_step

    def forward(self, recon_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """Scalar loss of the discriminator; does not reach the tokenizer."""
        real, fake = self.discriminator(images_B3HW.detach()), self.discriminator(recon_B3HW.detach())
        return self.config.adversarial * self.game.discriminator(real, fake)

    def tokenizer_loss(self, recon_B3HW: Tensor) -> Tensor:
        """Scalar loss that the tokenizer has on top of its own; does not reach the discriminator."""
        self.discriminator.requires_grad_(False)
        loss = self.config.adversarial * self.game.generator(self.discriminator(recon_B3HW))
        self.discriminator.requires_grad_(True)
        return loss
