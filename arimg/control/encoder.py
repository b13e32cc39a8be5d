"""Control encoder: a map in [-1, 1] becomes one token per image token (the control encoder of ControlAR,
arXiv 2410.02705).

Three kinds of Vision Transformer:

* "vit": ViT-S/16 as Hugging Face runs it (LayerNorm eps 1e-12, no layer scale), ControlAR's class-conditional encoder;
* "dinov2": DINOv2-S/B (patch 14, layer scale, LayerNorm eps 1e-6), ControlAR's text-conditional encoder;
* "small": a few layers trained from scratch; sin-cos positions, so any grid works; optionally told the type of the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.config import check_sizes
from arimg.control.vit import SmallViT
from arimg.errors import ConfigError, InputError

NORM_EPS = {"vit": 1e-12, "dinov2": 1e-6, "small": 1e-6}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a control encoder. Raises ConfigError on values that do not fit together."""

    kind: str = "small"                     # "vit", "dinov2" or "small"
    embed_dim: int = 128                    # E
    depth: int = 2
    heads: int = 4
    ffn_hidden: int = 512
    patch: int = 8                          # pixels per encoder patch
    stride: int = 8                         # pixels per image token; the map is resized when it differs from `patch`
    image_size: int | None = None           # side the learned position table was made for; None for "small"
    norm_eps: float | None = None           # None = that of the published encoders of this kind
    types: tuple[str, ...] = ("canny",)     # control types it was trained on

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.kind not in NORM_EPS:
            raise ConfigError(f"control encoder kind {self.kind!r} is unknown; use one of {', '.join(NORM_EPS)}")
        if self.embed_dim % self.heads:
            raise ConfigError(f"control encoder: embed_dim {self.embed_dim} is not a multiple of heads {self.heads}; "
                              f"use heads that divide {self.embed_dim}")
        if self.kind == "small" and self.embed_dim % 4:
            raise ConfigError(f"control encoder: embed_dim {self.embed_dim} is not a multiple of 4, which 2D sin-cos "
                              f"positions need; use {-self.embed_dim % 4 + self.embed_dim}")
        if self.kind != "small" and (self.image_size is None or self.image_size < self.patch):
            raise ConfigError(f"control encoder: image_size {self.image_size} gives no position table; the kind "
                              f"{self.kind!r} needs at least one patch of {self.patch} pixels")
        if not self.types:
            raise ConfigError("control encoder: types is empty; name at least one control type, for example canny")

    @property
    def reads_type(self) -> bool:
        """Whether the encoder is told which type of map it sees."""
        return self.kind == "small" and len(self.types) > 1


class ControlEncoder(nn.Module):
    """Maps (B, 3, H, W) to tokens (B, H/stride * W/stride, E), after the final norm, class token removed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        eps = config.norm_eps or NORM_EPS[config.kind]
        self.vit: Any = SmallViT(config, eps) if config.kind == "small" else published_vit(config, eps)
        self.type_embed = nn.Embedding(len(config.types), config.embed_dim) if config.reads_type else None

    def forward(self, maps_B3HW: Tensor, resample: str = "nearest", type_ids_B: Tensor | None = None) -> Tensor:
        """tokens_BLE in raster order.

        `maps_B3HW` lies in [-1, 1]. `resample` ("nearest" or "bicubic", a property of the control type) brings a map to
        `patch` pixels per token where that differs from `stride`. `type_ids_B` (int64, indices into `config.types`) is
        needed where the config `reads_type`. Raises InputError on sizes that are not multiples of the stride and on
        missing type ids.
        """
        pixels_B3HW = self._resized(maps_B3HW, resample).to(self.vit.patch_embed.proj.weight.dtype)
        x_BhwE = self.vit.patch_embed(pixels_B3HW)
        grid = (x_BhwE.shape[1], x_BhwE.shape[2])
        x_BLE = x_BhwE.flatten(1, 2)
        if self.config.kind == "small":
            x_BLE = x_BLE + sincos_positions(grid, self.config.embed_dim, x_BLE.device).to(x_BLE.dtype)
        else:
            x_BLE = self._with_class_token(x_BLE, grid)
        if self.type_embed is not None:
            x_BLE = x_BLE + self._type_vectors(type_ids_B)
        x_BLE = self.vit.norm(self.vit.blocks(x_BLE))
        return x_BLE if self.config.kind == "small" else x_BLE[:, 1:]

    def _with_class_token(self, x_BLE: Tensor, grid: tuple[int, int]) -> Tensor:
        table_1LE, class_token_11E = self.vit.pos_embed, self.vit.cls_token
        assert table_1LE is not None and class_token_11E is not None
        x_BLE = x_BLE + interpolate_positions(table_1LE[:, 1:], grid).to(x_BLE.dtype)
        first_B1E = (class_token_11E + table_1LE[:, :1]).to(x_BLE.dtype).expand(len(x_BLE), -1, -1)
        return torch.cat([first_B1E, x_BLE], dim=1)

    def _resized(self, maps_B3HW: Tensor, resample: str) -> Tensor:
        stride, patch = self.config.stride, self.config.patch
        height, width = maps_B3HW.shape[-2:]
        if height % stride or width % stride or not height or not width:
            nearest = " x ".join(str(max(stride, round(side / stride) * stride)) for side in (height, width))
            raise InputError(f"control map {height} x {width}: both sides must be multiples of {stride}; use {nearest}")
        if stride == patch:
            return maps_B3HW
        size = (height // stride * patch, width // stride * patch)
        if resample == "nearest":
            return F.interpolate(maps_B3HW, size, mode="nearest")
        assert resample == "bicubic", resample
        return F.interpolate(_at_least_float32(maps_B3HW), size, mode="bicubic", align_corners=True)

    def _type_vectors(self, type_ids_B: Tensor | None) -> Tensor:
        assert self.type_embed is not None
        if type_ids_B is None:
            raise InputError(f"the control encoder knows {len(self.config.types)} types of map and was not told which "
                             f"this is; give one of {', '.join(self.config.types)}")
        return self.type_embed(type_ids_B)[:, None]


def published_vit(config: EncoderConfig, eps: float) -> nn.Module:
    """timm's VisionTransformer of this size, with class token and learned positions."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size or config.patch, patch_size=config.patch, embed_dim=config.embed_dim,
        depth=config.depth, num_heads=config.heads,
        mlp_ratio=(config.ffn_hidden + 0.5) / config.embed_dim,     # timm truncates: this lands on ffn_hidden
        init_values=1.0 if config.kind == "dinov2" else None, class_token=True, pos_embed="learn",
        dynamic_img_size=True, num_classes=0, global_pool="", norm_layer=partial(nn.LayerNorm, eps=eps),
        act_layer=nn.GELU)


def interpolate_positions(table_1LE: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square position table brought to (h, w): bicubic, align_corners=False, no antialias, as in transformers."""
    side = int(table_1LE.shape[1] ** 0.5)
    if grid == (side, side):
        return table_1LE
    table_1Ehw = _at_least_float32(table_1LE).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized_1Ehw = F.interpolate(table_1Ehw, grid, mode="bicubic", align_corners=False)
    return resized_1Ehw.flatten(2).transpose(1, 2).to(table_1LE.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    """Bicubic resampling in half precision shifts what it resamples."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sincos_positions(grid: tuple[int, int], dim: int, device: torch.device) -> Tensor:
    """(h*w, dim) float32: sines and cosines of the row, then of the column, wavelengths 2 pi to 2 pi 10000.

    The two-dimensional form of the Transformer's table (arXiv 1706.03762, section 3.5).
    """
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    angles = [torch.arange(side, device=device, dtype=torch.float32)[:, None] * frequency for side in grid]
    rows_hE, columns_wE = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    h, w = grid
    return torch.cat([rows_hE[:, None].expand(h, w, -1), columns_wE[None].expand(h, w, -1)], dim=2).flatten(0, 1)
