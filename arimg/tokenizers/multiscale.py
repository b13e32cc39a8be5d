"""VAR's multi-scale VQVAE (Tian et al. 2024, arXiv:2404.02905, section 3.2): image <-> codes of ever finer grids.

A map f (B, C, h, w) is coded scale by scale: scale k codes what the coarser ones left over, on its own grid, and all
scales add up to f_hat. Letters: S scales; L tokens of all scales in one row; W tokens of one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.config import check_sizes
from arimg.errors import ConfigError, InputError
from arimg.presets import VAR_SIDES, square_scales
from arimg.tokenizers.base import Encoded
from arimg.tokenizers.convnet import Decoder, Encoder, check_image, check_widths
from arimg.tokenizers.vq import VQLosses, nearest_code

Scales = tuple[tuple[int, int], ...]        # (h, w) in tokens, coarse to fine

# (S, number of phis) -> the phi of each scale. Scales 2 and 7 of the released ten lie half-way between two phis, where
# the last bit of a division decides; these are what the release computes, and another choice changes every picture.
RELEASED_PHIS = {(10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)}
_NO_PHI = 1e-6


def check_scales(scales: Scales, error: type[ConfigError] | type[InputError]) -> None:
    """Raises `error` unless there are scales, of positive sides, none smaller than the one before."""
    ordered = all(fine[0] >= coarse[0] and fine[1] >= coarse[1] for coarse, fine in zip(scales, scales[1:]))
    if not scales or not ordered or min(map(min, scales)) < 1:
        raise error(f"scales={list(scales)}: give (h, w) pairs of positive sides, from coarse to fine")


@dataclass(frozen=True)
class MultiscaleConfig:
    """Sizes of a multi-scale tokenizer; the defaults are those of `vae_ch160v4096z32`. Raises ConfigError."""

    codebook_size: int = 4096                               # V
    codebook_dim: int = 32                                  # C, of the codes and of the maps
    base_channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)          # per level; stride = 2 ** (levels - 1)
    res_blocks: int = 2                                     # per encoder level; the decoder has one more
    in_channels: int = 3
    scales: Scales = square_scales(VAR_SIDES[256])          # the last one is the grid of f
    phis: int = 4                                           # networks that the scales share; 0 = one for each scale
    residual_ratio: float = 0.5                             # |r| of phi(h) = (1 - r) h + r conv(h); 0 = no phi
    conv_kernel: int = 3                                    # of the convolutions beside the quantiser
    z_norm: bool = False                                    # compare directions, not positions; codes keep their length
    commit_beta: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple((height, width) for height, width in self.scales))
        check_sizes(self, "res_blocks", "phis")
        check_widths(self.base_channels, self.multipliers)
        check_scales(self.scales, ConfigError)
        if self.conv_kernel % 2 == 0:
            raise ConfigError(f"conv_kernel={self.conv_kernel}: an even kernel shifts the map; give an odd one")

    @property
    def phi_count(self) -> int:
        """Phis with weights."""
        return 0 if abs(self.residual_ratio) <= _NO_PHI else self.phis or len(self.scales)


def phi_of_scale(scale: int, scales: int, phis: int) -> int:
    """Index of the phi nearest to scale k: its tick on [0, 1] against u = k / (S - 1); the lower one in a tie."""
    if (scales, phis) in RELEASED_PHIS:
        return RELEASED_PHIS[scales, phis][scale]
    first = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    step = (1 - first - first) / max(1, phis - 1)
    ticks = [first + step * i for i in range(phis - 1)] + [1 - first]
    return min(range(phis), key=lambda i: abs(ticks[i] - scale / max(1, scales - 1)))


class Phi(nn.Conv2d):
    """phi(h) = (1 - r) h + r conv3x3(h), in the precision of h."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h_BChw: Tensor) -> Tensor:
        """Same shape out."""
        assert self.bias is not None
        mixed_BChw = F.conv2d(h_BChw, self.weight.to(h_BChw.dtype), self.bias.to(h_BChw.dtype), padding=1)
        return h_BChw * (1 - self.ratio) + mixed_BChw * self.ratio


@dataclass(frozen=True)
class MultiscaleSpace:
    """Codebook and scales as decoders see them (`tokenizers.base.ScaleSpace`).

    Vectors need not be codes: maps and cells are defined, and have gradients, for any latents.
    """

    codebook_VC: Tensor
    scales: Scales
    phis: tuple[nn.Module, ...]         # of each scale
    z_norm: bool = False

    def nearest(self, latents_BLC: Tensor) -> Tensor:
        """codes_BL of the nearest entries, by distance or, under `z_norm`, by angle. Memory does not grow with V L."""
        codebook_VC = F.normalize(self.codebook_VC, dim=-1) if self.z_norm else self.codebook_VC
        latents_BLC = F.normalize(latents_BLC, dim=-1) if self.z_norm else latents_BLC
        return nearest_code(latents_BLC.flatten(0, -2), codebook_VC).view(latents_BLC.shape[:-1])

    def split(self, tokens_BL: Tensor) -> tuple[Tensor, ...]:
        """Codes or vectors of all scales (B, L, ...), scale by scale. Raises InputError when L is another."""
        sizes = [height * width for height, width in self.scales]
        if tokens_BL.shape[1] != sum(sizes):
            raise InputError(f"{tokens_BL.shape[1]} tokens; the scales {_text(self.scales)} hold {sum(sizes)}")
        return tokens_BL.split(sizes, dim=1)

    def accumulate(self, map_BChw: Tensor | None, latents_BWC: Tensor, k: int) -> Tensor:
        """f_hat after scale k: f_hat before it (None = nothing yet) plus what the scale adds."""
        added_BChw = self.enlarged(latents_BWC, k)
        return added_BChw if map_BChw is None else map_BChw + added_BChw

    def enlarged(self, latents_BWC: Tensor, k: int) -> Tensor:
        """phi_k of scale k on the grid of the last scale, (B, C, h, w)."""
        h_BChw = latents_BWC.unflatten(1, self.scales[k]).movedim(-1, 1)
        if k < len(self.scales) - 1:
            h_BChw = F.interpolate(h_BChw, self.scales[-1], mode="bicubic")
        return self.phis[k](h_BChw)

    def next_input(self, map_BChw: Tensor, k: int) -> Tensor:
        """cells_BWC that a transformer reads at scale k: the area means of f_hat after scale k - 1 on its grid."""
        return F.interpolate(map_BChw, self.scales[k], mode="area").flatten(2).transpose(1, 2)

    def maps(self, latents_BLC: Tensor) -> list[Tensor]:
        """f_hat after each scale, S times (B, C, h, w), of code vectors or any others (paper, algorithm 2)."""
        maps: list[Tensor] = []
        for k, latents_BWC in enumerate(self.split(latents_BLC)):
            maps.append(self.accumulate(maps[-1] if maps else None, latents_BWC, k))
        return maps

    def quantise(self, f_BChw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """codes_BL of a map, and f_hat after each scale (paper, algorithm 1). Raises InputError on another grid."""
        if f_BChw.shape[2:] != self.scales[-1]:
            raise InputError(f"a map of {f_BChw.shape[2]}x{f_BChw.shape[3]} tokens; the scales {_text(self.scales)} "
                             "need one as large as the last: give scales for this image size, or another size")
        rest_BChw, codes, maps = f_BChw.detach(), list[Tensor](), list[Tensor]()
        for k in range(len(self.scales)):
            codes.append(self.nearest(self.next_input(rest_BChw, k)))
            added_BChw = self.enlarged(F.embedding(codes[-1], self.codebook_VC), k)
            maps.append(maps[-1] + added_BChw if maps else added_BChw)
            rest_BChw = rest_BChw - added_BChw.detach()
        return torch.cat(codes, dim=1), maps


class MultiscaleQuantizer(nn.Module):
    """One codebook for all scales, and the phis. It computes in float32 at least."""

    def __init__(self, config: MultiscaleConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        self.phis = nn.ModuleList(Phi(config.codebook_dim, abs(config.residual_ratio))
                                  for _ in range(config.phi_count))

    def view(self, codebook_VC: Tensor, scales: Scales | None = None) -> MultiscaleSpace:
        """The quantiser on other scales than the config's, and with this codebook. Raises InputError."""
        scales = self.config.scales if scales is None else scales
        check_scales(scales, InputError)
        phis = tuple(self.phis[phi_of_scale(k, len(scales), len(self.phis))] if len(self.phis) else nn.Identity()
                     for k in range(len(scales)))
        return MultiscaleSpace(codebook_VC, scales, phis, self.config.z_norm)

    def space(self, scales: Scales | None = None) -> MultiscaleSpace:
        """Codebook (float32 at least, detached) and scales for decoders. Raises InputError on scales in no order."""
        codebook_VC = self.embedding.weight.detach()
        return self.view(codebook_VC.to(torch.promote_types(codebook_VC.dtype, torch.float32)), scales)

    def forward(self, f_BChw: Tensor) -> tuple[Tensor, Tensor, VQLosses]:
        """Training pass: straight-through map, codes_BL, losses. The loss is that of the released code, the mean over
        the scales of |f_hat_k - sg f|^2 + beta |sg f_hat_k - f|^2 (means over elements)."""
        with torch.autocast(f_BChw.device.type, enabled=False):
            f_BChw = f_BChw.to(torch.promote_types(f_BChw.dtype, torch.float32))
            codes_BL, maps = self.view(self.embedding.weight.to(f_BChw.dtype)).quantise(f_BChw)
            losses = VQLosses(
                vq=torch.stack([F.mse_loss(one, f_BChw.detach()) for one in maps]).mean(),
                commit=self.config.commit_beta * torch.stack([F.mse_loss(f_BChw, one.detach()) for one in maps]).mean(),
                entropy=f_BChw.new_zeros(()))
            return f_BChw + (maps[-1] - f_BChw).detach(), codes_BL, losses


class MultiscaleTokenizer(nn.Module):
    """Encoder, convolution, multi-scale quantiser, convolution, decoder. Images are (B, 3, H, W) in [-1, 1].

    `scales` of a method replace the config's: the same weights serve other image sizes (VAR: 512 and 1024 pixels,
    presets.VAR_SIDES).
    """

    def __init__(self, config: MultiscaleConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.in_channels, config.base_channels, config.multipliers, config.res_blocks, config.codebook_dim)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quantize = MultiscaleQuantizer(config)
        self.quant_conv, self.post_quant_conv = (
            nn.Conv2d(config.codebook_dim, config.codebook_dim, config.conv_kernel, padding=config.conv_kernel // 2)
            for _ in range(2))

    @property
    def stride(self) -> int:
        """Pixels per side of a token of the finest scale."""
        return 2 ** (len(self.config.multipliers) - 1)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.codebook_size

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """f (B, C, h, w) before quantisation. Raises InputError when a side is not a multiple of the stride."""
        check_image(images_B3HW, self.stride)
        return self.quant_conv(self.encoder(images_B3HW))

    def encode(self, images_B3HW: Tensor, scales: Scales | None = None) -> Encoded:
        """Codes of all scales in one row and f_hat. Raises InputError when the image is not as large as the scales."""
        codes_BL, maps = self.encode_scales(images_B3HW, scales)
        return Encoded(codes_BL, maps[-1], (maps[-1].shape[2], maps[-1].shape[3]))

    def encode_scales(self, images_B3HW: Tensor, scales: Scales | None = None) -> tuple[Tensor, list[Tensor]]:
        """codes_BL and f_hat after each scale. Raises InputError when the image is not as large as the scales."""
        f_BChw = self.latents(images_B3HW)
        return self.space(scales).quantise(f_BChw.to(torch.promote_types(f_BChw.dtype, torch.float32)))

    def lookup(self, codes_BL: Tensor, grid: tuple[int, int], scales: Scales | None = None) -> Tensor:
        """f_hat (B, C, h, w) of the codes of all scales. Raises InputError when these do not end at `grid`."""
        space = self.space(scales)
        if space.scales[-1] != grid:
            raise InputError(f"grid {grid[0]}x{grid[1]}: the scales {_text(space.scales)} end elsewhere; give scales "
                             "that end there")
        return space.maps(F.embedding(codes_BL, space.codebook_VC))[-1]

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """images_B3HW of f_hat, unclamped."""
        return self.decoder(self.post_quant_conv(latents_BChw.to(self.post_quant_conv.weight.dtype)))

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int], scales: Scales | None = None) -> Tensor:
        """images_B3HW of the codes of all scales, unclamped. Raises InputError as `lookup`."""
        return self.decode(self.lookup(codes_BL, grid, scales))

    def space(self, scales: Scales | None = None) -> MultiscaleSpace:
        """Codebook and scales for decoders. Raises InputError on scales in no order."""
        return self.quantize.space(scales)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, VQLosses]:
        """Training pass: reconstructions, codes_BL, quantiser losses. Needs no process group."""
        f_BChw = self.latents(images_B3HW)
        through_BChw, codes_BL, losses = self.quantize(f_BChw)
        return self.decode(through_BChw), codes_BL, losses


def _text(scales: Scales) -> str:
    return ", ".join(f"{height}x{width}" for height, width in scales)
