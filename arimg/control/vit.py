"""The few Transformer layers of the control encoder "small", under timm's names.

The published encoders are timm's own VisionTransformer; importing timm takes as long as importing torch, which the
embedded model's users need not wait for. tests/control/test_encoder.py compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from arimg.control.encoder import EncoderConfig


class PatchEmbed(nn.Module):
    """Linear map of p x p pixels."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, h, w, E)."""
        return self.proj(x_B3HW).movedim(1, -1)


class Attention(nn.Module):
    """Full self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Same shape."""
        q, k, v = self.qkv(x_BLE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Dosovitskiy et al. 2020, section 3.1)."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Same shape."""
        x_BLE = x_BLE + self.attn(self.norm1(x_BLE))
        return x_BLE + self.mlp(self.norm2(x_BLE))


class SmallViT(nn.Module):
    """Patches, blocks, norm: the caller adds positions between the first two. Weights as timm initialises them."""

    def __init__(self, config: EncoderConfig, eps: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.patch, config.embed_dim)
        self.blocks = nn.Sequential(*(Block(config.embed_dim, config.heads, config.ffn_hidden, eps)
                                      for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.embed_dim, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
