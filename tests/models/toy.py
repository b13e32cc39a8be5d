"""Toy transformers whose every weight matters, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition

CLASSES, CAPTION = 5, (7, 12)       # (slots, channels)
SIZES: dict[str, Any] = dict(
    vocab_size=32, dim=32, layers=3, heads=4, ffn_hidden=48, block_size=16, num_classes=CLASSES,
    caption_length=CAPTION[0], caption_dim=CAPTION[1], inject_layers=(0, 1, 2), token_dropout=0.0,
    residual_dropout=0.0, ffn_dropout=0.0)


def toy_model(seed: int = 0, **changes: Any) -> ARTransformer:
    """In eval mode; weights N(0, 0.3), so that no path is negligible."""
    model = ARTransformer(ARConfig(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def toy_codes(batch: int, length: int = 16, seed: int = 1) -> Tensor:
    """codes_BL."""
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def toy_classes(batch: int) -> Condition:
    """Classes 0, 1, 2 ..."""
    return Condition(class_ids_B=torch.arange(batch) % CLASSES)


def toy_captions(batch: int, seed: int = 2) -> Condition:
    """Left-padded captions of 1, 3, 5, 7, 1 ... slots."""
    caption = torch.randn(batch, *CAPTION, generator=torch.Generator().manual_seed(seed))
    lengths = 1 + 2 * torch.arange(batch) % 8
    mask = torch.arange(CAPTION[0]) >= (CAPTION[0] - lengths)[:, None]
    return Condition(caption_BPC=caption * mask[..., None], caption_mask_BP=mask)


def toy_inject(batch: int, length: int = 16, points: int = 3, seed: int = 3) -> Tensor:
    """inject_KBLD."""
    return torch.randn(points, batch, length, SIZES["dim"], generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_by_steps(model: ARTransformer, condition: Condition, codes: Tensor, grid: tuple[int, int],
                    inject: Tensor | None = None) -> Tensor:
    """logits_BLV of one token per pass through the storing cache."""
    batch, length = codes.shape
    first = model.prefix_length
    cache = model.new_cache(batch, first + length, grid, condition.caption_mask_BP)
    start = None if inject is None else torch.nn.functional.pad(inject[:, :, :1], (0, 0, first - 1, 0))
    h = model.step(model.prefix(condition), torch.arange(first).expand(batch, -1), cache, start)
    logits = [model.logits(h[:, -1:])]
    for j in range(length - 1):
        slots = torch.full((batch, 1), first + j)
        here = None if inject is None else inject[:, :, j + 1:j + 2]
        logits.append(model.logits(model.step(model.embed(codes[:, j:j + 1], slots), slots, cache, here)))
    return torch.cat(logits, dim=1)
