"""Toy students whose every weight matters, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arimg.models.students import ARStudent
from tests.models.toy import toy_model

LATENTS = 4


def perturb(module: nn.Module, seed: int = 0, std: float = 0.3) -> Any:
    """Weights N(0, std), in eval mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def toy_student(**changes: Any) -> ARStudent:
    """Of `toy_model`."""
    return perturb(ARStudent.from_teacher(toy_model(**changes), LATENTS))


def toy_latents(batch: int, length: int = 16, seed: int = 5, channels: int = LATENTS) -> Tensor:
    """noise_BLC."""
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(before: Tensor, after: Tensor) -> list[int]:
    """Positions of (B, L, ...) tensors that differ."""
    return (before != after).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
