"""The VQ tokenizer of LlamaGen (Sun et al. 2024, section 2.1): image <-> raster codes, with its state-dict keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.config import check_sizes
from arimg.errors import ConfigError
from arimg.tokenizers.base import Encoded
from arimg.tokenizers.convnet import Decoder, Encoder, check_image, check_widths

_CHUNK = 4096           # rows of the distance table held at a time
_ENTROPY_TEMPERATURE = 0.01


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ tokenizer; the defaults are VQ-16."""

    codebook_size: int = 16384                              # V
    codebook_dim: int = 8                                   # C
    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)          # per level; stride = patch_size * 2 ** (levels - 1)
    decoder_multipliers: tuple[int, ...] | None = None      # None = as the encoder's
    res_blocks: int = 2                                     # per encoder level; the decoder has one more
    z_channels: int = 256
    in_channels: int = 3
    patch_size: int = 1                                     # square of pixels folded into channels at both ends
    l2_norm: bool = True                                    # unit-length latents and codes
    commit_beta: float = 0.25
    entropy_ratio: float = 0.0                              # 0 = the term is not computed

    def __post_init__(self) -> None:
        check_sizes(self, "res_blocks")
        if len(self.decoder_multipliers or self.multipliers) != len(self.multipliers):
            raise ConfigError(f"decoder_multipliers={list(self.decoder_multipliers or ())}: the encoder has "
                              f"{len(self.multipliers)} levels; give as many")
        check_widths(self.base_channels, [*self.multipliers, *(self.decoder_multipliers or ())])

    @property
    def stride(self) -> int:
        """Pixels per token side."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class VQLosses:
    """Scalar losses of the quantiser, weighted as LlamaGen does."""

    vq: Tensor          # mean (z_q - sg z)^2
    commit: Tensor      # beta * mean (sg z_q - z)^2
    entropy: Tensor     # ratio * (mean entropy per sample - entropy of the mean)


@dataclass(frozen=True)
class VQSpace:
    """A codebook as decoders see it (`tokenizers.base.TokenSpace`)."""

    codebook_VC: Tensor
    scales: tuple[tuple[int, int], ...] | None = None

    def nearest(self, latents_BLC: Tensor) -> Tensor:
        """codes_BL of the nearest entries by Euclidean distance."""
        return nearest_code(latents_BLC.flatten(0, -2), self.codebook_VC).view(latents_BLC.shape[:-1])


def nearest_code(z_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Index of the nearest code for each row, int64 (N,).

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, without the constant |z|^2, in chunks of rows so that memory stays bounded at any
    N; in float32 at least, under autocast too.
    """
    dtype = torch.promote_types(z_NC.dtype, torch.float32)
    z_NC, codebook_VC = z_NC.to(dtype), codebook_VC.to(dtype)
    norms_V = codebook_VC.square().sum(1)
    with torch.autocast(z_NC.device.type, enabled=False):
        return torch.cat([torch.addmm(norms_V, rows, codebook_VC.t(), alpha=-2).argmin(1)
                          for rows in z_NC.split(_CHUNK)])


class VectorQuantizer(nn.Module):
    """A codebook with straight-through gradients."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        if config.l2_norm:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def normalise(self, x: Tensor) -> Tensor:
        """Unit vectors along the last axis if the codebook is l2-normalised, else `x`."""
        return F.normalize(x, dim=-1) if self.config.l2_norm else x

    def codebook(self) -> Tensor:
        """codebook_VC as it is looked up."""
        return self.normalise(self.embedding.weight)

    def lookup(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """Quantised latents (B, C, h, w) of raster codes."""
        return F.embedding(codes_BL, self.codebook()).unflatten(1, grid).movedim(-1, 1)

    def losses(self, z_NC: Tensor, quantised_NC: Tensor) -> VQLosses:
        """Quantiser losses for normalised latents and the codes they fell on."""
        ratio = self.config.entropy_ratio
        return VQLosses(
            vq=F.mse_loss(quantised_NC, z_NC.detach()),
            commit=self.config.commit_beta * F.mse_loss(z_NC, quantised_NC.detach()),
            entropy=ratio * entropy_loss(z_NC, self.codebook()) if ratio else z_NC.new_zeros(()))

    def forward(self, z_BChw: Tensor) -> tuple[Tensor, Tensor, VQLosses]:
        """Training pass: straight-through latents (B, C, h, w), codes_BL, losses."""
        z_BhwC = self.normalise(z_BChw.movedim(1, -1))
        z_NC = z_BhwC.flatten(0, 2)
        codebook_VC = self.codebook()
        codes_N = nearest_code(z_NC.detach(), codebook_VC.detach())
        quantised_NC = F.embedding(codes_N, codebook_VC)
        through_BhwC = (z_NC + (quantised_NC - z_NC).detach()).view(z_BhwC.shape)
        return through_BhwC.movedim(-1, 1), codes_N.view(len(z_BChw), -1), self.losses(z_NC, quantised_NC)

    @torch.no_grad()
    def revive(self, z_BChw: Tensor, dead_V: Tensor, generator: torch.Generator | None = None) -> int:
        """Move dead codes (bool mask) onto latents drawn from the batch. Returns how many moved. No gradients."""
        z_NC = self.normalise(z_BChw.movedim(1, -1)).flatten(0, 2)
        dead = dead_V.nonzero().flatten()[:len(z_NC)]
        chosen = torch.randperm(len(z_NC), device=z_NC.device, generator=generator)[:len(dead)]
        self.embedding.weight[dead] = z_NC[chosen].to(self.embedding.weight.dtype)
        return len(dead)


def entropy_loss(z_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """Mean entropy per sample minus the entropy of the mean, of softmax(-distance / 0.01) (MaskGIT's VQ code, as used
    by LlamaGen); low when each latent is sure of its code and all codes are used."""
    with torch.autocast(z_NC.device.type, enabled=False):
        inner_NV = z_NC @ codebook_VC.t()
    distance_NV = z_NC.square().sum(1, keepdim=True) + codebook_VC.square().sum(1) - 2 * inner_NV
    logits_NV = -distance_NV / _ENTROPY_TEMPERATURE
    p_NV = logits_NV.softmax(-1)
    mean_V = p_NV.mean(0)
    per_sample = -(p_NV * F.log_softmax(logits_NV + 1e-5, dim=-1)).sum(-1).mean()
    return per_sample + (mean_V * torch.log(mean_V + 1e-5)).sum()


class CodebookUsage:
    """Share of the codebook among the last `window` codes."""

    def __init__(self, codebook_size: int, window: int = 65536) -> None:
        self.codebook_size = codebook_size
        self.window = window
        self.recent = torch.empty(0, dtype=torch.long)

    def update(self, codes: Tensor) -> float:
        """Add codes of any shape; returns the usage in [0, 1]."""
        self.recent = torch.cat([self.recent, codes.detach().flatten().cpu()])[-self.window:]
        return 1 - self.dead().float().mean().item()

    def dead(self) -> Tensor:
        """Bool mask (V,) of codes not seen within the window."""
        return torch.bincount(self.recent, minlength=self.codebook_size) == 0


class VQTokenizer(nn.Module):
    """Encoder, 1x1 projection, codebook, 1x1 projection, decoder. Images are (B, 3, H, W) in [-1, 1]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.in_channels * config.patch_size ** 2
        base, blocks, latents = config.base_channels, config.res_blocks, config.z_channels
        self.encoder = Encoder(channels, base, config.multipliers, blocks, latents)
        self.decoder = Decoder(channels, base, config.decoder_multipliers or config.multipliers, blocks, latents)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def stride(self) -> int:
        """Pixels per token side."""
        return self.config.stride

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.codebook_size

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """(B, C, h, w) before quantisation. Raises InputError when a side is not a multiple of the stride."""
        check_image(images_B3HW, self.stride)
        return self.quant_conv(self.encoder(F.pixel_unshuffle(images_B3HW, self.config.patch_size)))

    def encode(self, images_B3HW: Tensor) -> Encoded:
        """Codes and quantised latents. Raises InputError when a side is not a multiple of the stride."""
        z_BChw = self.latents(images_B3HW)
        z_BhwC = self.quantize.normalise(z_BChw.movedim(1, -1))
        codes_BL = nearest_code(z_BhwC.flatten(0, 2), self.quantize.codebook()).view(len(images_B3HW), -1)
        grid = (z_BChw.shape[2], z_BChw.shape[3])
        return Encoded(codes_BL, self.lookup(codes_BL, grid), grid)

    def lookup(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """Quantised latents (B, C, h, w) of raster codes."""
        return self.quantize.lookup(codes_BL, grid)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """images_B3HW of quantised latents, unclamped."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(latents_BChw)), self.config.patch_size)

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3HW of raster codes, unclamped."""
        return self.decode(self.lookup(codes_BL, grid))

    def space(self) -> VQSpace:
        """The codebook for decoders, float32."""
        return VQSpace(self.quantize.codebook().detach().float())

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, VQLosses]:
        """Training pass: reconstructions, codes_BL, quantiser losses (quantised in float32 at least)."""
        z_BChw = self.latents(images_B3HW)
        through_BChw, codes_BL, losses = self.quantize(z_BChw.to(torch.promote_types(z_BChw.dtype, torch.float32)))
        return self.decode(through_BChw.to(z_BChw.dtype)), codes_BL, losses
