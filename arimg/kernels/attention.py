"""Attention by attention.cpp. Letters: R rows; H query and G key heads; W queries; S slots; E channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Tell torch.compile the shape of the result. Called once, after the build."""
    torch.library.register_fake("arimg::attention", _shape)


def exact_attention(q_RHWE: Tensor, k_RGSE: Tensor, v_RGSE: Tensor, mask: Tensor | None) -> Tensor:
    """(R, H, W, E) in float32: a query's result depends on no other query, and not on how many there are. `mask` is
    bool, broadcastable to (R, 1, W, S); None = query w sees the slots 0 .. w."""
    if mask is not None:
        mask = mask.expand(len(q_RHWE), 1, q_RHWE.shape[2], k_RGSE.shape[2])
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    out_RWHE: Tensor = torch.ops.arimg.attention(q_RHWE.float(), k_RGSE, v_RGSE, mask)
    return out_RWHE.transpose(1, 2)


def _shape(q_RHWE: Tensor, k_RGSE: Tensor, v_RGSE: Tensor, mask: Tensor | None) -> Tensor:
    rows, heads, width, size = q_RHWE.shape
    return q_RHWE.new_empty(rows, width, heads, size)
