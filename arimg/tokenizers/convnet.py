"""The convolutional encoder and decoder of the VQGAN family (Esser et al. 2021), with LlamaGen's module names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import ConfigError, InputError
from arimg.tokenizers.winograd import Conv3x3


def check_widths(base_channels: int, multipliers: Sequence[int]) -> None:
    """Raises ConfigError when a level has a width that group norm cannot part."""
    widths = [base_channels * multiplier for multiplier in (1, *multipliers)]
    if not multipliers or any(width % 32 or not width for width in widths):
        raise ConfigError(f"base_channels={base_channels}, multipliers={list(multipliers)} give widths {widths}; "
                          "group norm needs multiples of 32, and at least one level")


def check_image(images_B3HW: Tensor, stride: int) -> None:
    """Raises InputError when a side is not a multiple of the stride."""
    height, width = images_B3HW.shape[-2:]
    if height % stride or width % stride or not height or not width:
        nearest = "x".join(str(max(1, round(side / stride)) * stride) for side in (height, width))
        raise InputError(f"image size {height}x{width}: both sides must be multiples of {stride}; "
                         f"the nearest is {nearest}")


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input (through a 1x1 where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = Conv3x3(channels_in, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = Conv3x3(channels_out, channels_out)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H, W)."""
        h = self.conv1.paint(x_BCHW, self.norm1)
        through = self.nin_shortcut(x_BCHW) if hasattr(self, "nin_shortcut") else x_BCHW
        return self.conv2.paint(h, self.norm2, plus_BKHW=through)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same shape out."""
        h = self.norm(x_BCHW)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x_BCHW.shape[2:])
        return x_BCHW + self.proj_out(h)


class Downsample(nn.Module):
    """Zero padding on the right and bottom, 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Half the height and width."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Twice the height and width."""
        return self.conv.paint(x_BCHW, double=True)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of resolution."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool,
                 resample: type[Downsample] | type[Upsample] | None) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(channels_out) for _ in range(blocks if attention else 0))
        if resample is not None:
            self.add_module("downsample" if resample is Downsample else "upsample", resample(channels_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H', W')."""
        for index, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x_BCHW = getattr(self, name)(x_BCHW)
        return x_BCHW


def middle(channels: int) -> nn.ModuleList:
    """Residual, attention, residual."""
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """Image to latent grid.

    attention_levels: levels, 0 = full resolution, with attention after each block; None = the lowest resolution only.
    """

    def __init__(self, in_channels: int, base_channels: int, multipliers: Sequence[int], res_blocks: int,
                 z_channels: int, attention_levels: Collection[int] | None = None) -> None:
        super().__init__()
        widths = [base_channels] + [base_channels * multiplier for multiplier in multipliers]
        last = len(multipliers) - 1
        attended = {last} if attention_levels is None else set(attention_levels)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(widths[level], widths[level + 1], res_blocks, level in attended,
                  None if level == last else Downsample)
            for level in range(last + 1))
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, z_channels, H / 2**n, W / 2**n)."""
        h = self.conv_in(x_BCHW)
        for block in (*self.conv_blocks, *self.mid):
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent grid to image: the encoder's mirror with one more residual block per level.

    `conv_blocks` begins at the lowest resolution; multipliers and attention_levels count as in the encoder.
    """

    def __init__(self, out_channels: int, base_channels: int, multipliers: Sequence[int], res_blocks: int,
                 z_channels: int, attention_levels: Collection[int] | None = None) -> None:
        super().__init__()
        widths = [base_channels * multiplier for multiplier in reversed(multipliers)]
        last = len(multipliers) - 1
        attended = {last} if attention_levels is None else set(attention_levels)
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(level - 1, 0)], widths[level], res_blocks + 1, last - level in attended,
                  None if level == last else Upsample)
            for level in range(last + 1))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z_BChw: Tensor) -> Tensor:
        """(B, z_channels, h, w) to (B, out_channels, h * 2**n, w * 2**n), unclamped."""
        h = self.conv_in(z_BChw)
        for block in (*self.mid, *self.conv_blocks):
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))
