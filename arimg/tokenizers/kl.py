"""MAR's continuous tokenizer (Li et al. 2024, arXiv:2406.11838, section 3.4): the KL autoencoder of latent diffusion
(Rombach et al. 2022, arXiv:2112.10752, section 3.1), image <-> a Gaussian over maps of latents.

diffusers' AutoencoderKL carries the same numbers where the first multiplier is 1: `interop.kl` moves weights there and
back. It has no patches, and leaves `scale` to its caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.config import check_sizes
from arimg.errors import ConfigError, InputError
from arimg.noise import CounterNoise, Purpose
from arimg.tokenizers.convnet import Decoder, Encoder, check_image, check_widths

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class KLConfig:
    """Sizes of a KL autoencoder; the defaults are MAR's KL-16. Raises ConfigError.

    KL-8 as MAR uses it: multipliers=(1, 2, 4, 4), latent_channels=4, attention_levels=(), patch_size=2, and the scale
    of its weights.
    """

    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)      # per level, 0 = full resolution
    res_blocks: int = 2                                 # per encoder level; the decoder has one more
    latent_channels: int = 16
    in_channels: int = 3
    attention_levels: tuple[int, ...] = (4,)            # of the encoder, whatever the size of the image
    decoder_attention_levels: tuple[int, ...] = ()      # none in MAR's
    patch_size: int = 1                                 # square of latents that makes one token
    scale: float = 0.2325                               # 1 / std of the latents of the training images

    def __post_init__(self) -> None:
        check_sizes(self, "res_blocks")
        check_widths(self.base_channels, self.multipliers)
        levels = range(len(self.multipliers))
        for name in ("attention_levels", "decoder_attention_levels"):
            if any(level not in levels for level in getattr(self, name)):
                raise ConfigError(f"{name}={list(getattr(self, name))}: the levels are 0 to {levels[-1]}")
        if not self.scale > 0:
            raise ConfigError(f"scale={self.scale}: must be positive")


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents (B, C, h, w)."""

    mean_BChw: Tensor
    log_variance_BChw: Tensor

    @classmethod
    def from_moments(cls, moments_BChw: Tensor) -> Posterior:
        """Halves of the channels: mean, log-variance (clamped to LOG_VARIANCE_RANGE)."""
        mean_BChw, log_variance_BChw = moments_BChw.chunk(2, dim=1)
        return cls(mean_BChw, log_variance_BChw.clamp(*LOG_VARIANCE_RANGE))

    @property
    def std_BChw(self) -> Tensor:
        """Standard deviation."""
        return torch.exp(0.5 * self.log_variance_BChw)

    def sample(self, noise_BChw: Tensor) -> Tensor:
        """Latents for standard normal noise."""
        return self.mean_BChw + self.std_BChw * noise_BChw

    def kl(self) -> Tensor:
        """KL divergence from the standard normal (B,), summed over the latents."""
        terms = self.mean_BChw.square() + self.log_variance_BChw.exp() - 1 - self.log_variance_BChw
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, latents_BChw: Tensor) -> Tensor:
        """Negative log-density (B,) at `latents_BChw`, summed over the latents."""
        squares = (latents_BChw - self.mean_BChw).square() * torch.exp(-self.log_variance_BChw)
        return 0.5 * (math.log(2 * math.pi) + self.log_variance_BChw + squares).sum((1, 2, 3))


class KLTokenizer(nn.Module):
    """Encoder, 1x1 projection, Gaussian, 1x1 projection, decoder. Images are (B, 3, H, W) in [-1, 1].

    Tokens are maps (B, C * patch_size ** 2, h, w) of scaled latents; the numbers of a token are ordered channel, row in
    the patch, column in the patch, as MAR orders them.
    """

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.in_channels, config.base_channels, config.multipliers, config.res_blocks)
        channels = config.latent_channels
        self.encoder = Encoder(*sizes, 2 * channels, config.attention_levels)
        self.decoder = Decoder(*sizes, channels, config.decoder_attention_levels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def stride(self) -> int:
        """Pixels per token side."""
        return self.config.patch_size * 2 ** (len(self.config.multipliers) - 1)

    @property
    def token_channels(self) -> int:
        """Numbers per token."""
        return self.config.latent_channels * self.config.patch_size ** 2

    def space(self) -> None:
        """There is no codebook."""

    def moments(self, images_B3HW: Tensor) -> Tensor:
        """(B, 2C, H / 2**n, W / 2**n): mean and raw log-variance. Raises InputError when a side is not a multiple of
        the stride."""
        check_image(images_B3HW, self.stride)
        return self.quant_conv(self.encoder(images_B3HW))

    def posterior(self, images_B3HW: Tensor) -> Posterior:
        """The law of the unscaled latents. Raises InputError as `moments`."""
        return Posterior.from_moments(self.moments(images_B3HW))

    def noise(self, seeds_B: Tensor, grid: tuple[int, int]) -> Tensor:
        """Standard normal tokens (B, C * patch_size ** 2, h, w), each a function of its image's seed and position."""
        positions_BL = torch.arange(grid[0] * grid[1], device=seeds_B.device).expand(len(seeds_B), -1)
        noise_BLC = CounterNoise().normal(seeds_B, positions_BL, self.token_channels, Purpose.POSTERIOR)
        return noise_BLC.unflatten(1, grid).movedim(-1, 1)

    def encode(self, images_B3HW: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
        """Tokens of the posterior's sample for `noise_BChw` (of the shape of the tokens, see `noise`), or of its mean.

        Raises InputError as `moments`, and on noise of another shape.
        """
        posterior = self.posterior(images_B3HW)
        latents_BChw = posterior.mean_BChw
        if noise_BChw is not None:
            unpatched_BChw = F.pixel_shuffle(noise_BChw.to(latents_BChw.dtype), self.config.patch_size)
            if unpatched_BChw.shape != latents_BChw.shape:
                patched_BChw = F.pixel_unshuffle(latents_BChw, self.config.patch_size)
                raise InputError(f"noise of shape {tuple(noise_BChw.shape)}; give one of {tuple(patched_BChw.shape)}, "
                                 "the shape of the tokens")
            latents_BChw = posterior.sample(unpatched_BChw)
        return F.pixel_unshuffle(latents_BChw * self.config.scale, self.config.patch_size)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """images_B3HW of tokens, unclamped."""
        latents_BChw = latents_BChw.to(self.post_quant_conv.weight.dtype) / self.config.scale
        return self.decoder(self.post_quant_conv(F.pixel_shuffle(latents_BChw, self.config.patch_size)))

    def forward(self, images_B3HW: Tensor, noise_BChw: Tensor) -> tuple[Tensor, Posterior]:
        """Training pass: reconstructions from the sample for `noise_BChw` (of the latents), and the posterior, whose
        `kl` is the penalty."""
        posterior = self.posterior(images_B3HW)
        return self.decoder(self.post_quant_conv(posterior.sample(noise_BChw))), posterior
