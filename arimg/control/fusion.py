"""Fusion: control tokens become what is added to the model's residual stream (ControlAR, arXiv 2410.02705).

    C = condition_mlp(adapter_mlp(tokens))        inject_k = condition_layers[k](C), k = 0 .. K-1

Row j of inject_k is added before layer `injection_layers(...)[k]` at the slot whose output predicts token j. A model of
several scales has a row for every token of every scale: the control tokens are a map, and each scale reads its means
over the areas of its cells (`at_scales`).

Every MLP is fc2(gelu_tanh(fc1(x))) without biases, so a control of zeros adds exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import ConfigError, InputError


class MLP(nn.Module):
    """fc2(gelu_tanh(fc1(x))), no biases; weights start at variance 1 / fan-in, or the output at zero."""

    def __init__(self, in_dim: int, dim: int, zero_output: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.fc1.weight, std=in_dim ** -0.5)
        if zero_output:
            nn.init.zeros_(self.fc2.weight)
        else:
            nn.init.normal_(self.fc2.weight, std=dim ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) to (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ControlFusion(nn.Module):
    """Tokens (B, L, E) to inject_KBLD. A new fusion adds nothing: the last layers of `condition_layers` are zero."""

    def __init__(self, encoder_dim: int, dim: int, points: int) -> None:
        super().__init__()
        self.adapter_mlp = MLP(encoder_dim, dim)
        self.condition_mlp = MLP(dim, dim)
        self.condition_layers = nn.ModuleList(MLP(dim, dim, zero_output=True) for _ in range(points))

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        """inject_KBLD at strength 1."""
        control_BLD = self.condition_mlp(self.adapter_mlp(tokens_BLE))
        return torch.stack([layer(control_BLD) for layer in self.condition_layers])


def at_scales(tokens_BLE: Tensor, grid: tuple[int, int], scales: Sequence[tuple[int, int]]) -> Tensor:
    """Control tokens of a grid as those of all `scales` (h, w), one after the other: area means, coarse to fine."""
    map_BEhw = tokens_BLE.movedim(1, -1).unflatten(-1, grid)
    return torch.cat([F.adaptive_avg_pool2d(map_BEhw, scale).flatten(2) for scale in scales], dim=2).movedim(1, -1)


def injection_layers(layers: int, points: int = 3) -> tuple[int, ...]:
    """Layers before which a control is added: 0, n, 2n, ... with n = layers // points (ControlAR: 0, 4, 8 of 12).

    Works for any layer count; a model with fewer layers than points gets one point per layer.
    """
    if layers < 1 or points < 1:
        raise ConfigError(f"{points} injection points in {layers} layers: both must be at least 1; "
                          "ControlAR uses 3 points")
    points = min(points, layers)
    return tuple(k * (layers // points) for k in range(points))


def combine(injects: Sequence[Tensor], scales: Sequence[float], starts: Sequence[float] | None = None,
            ends: Sequence[float] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
    """Sum over controls i of s_i(j) * inject_i, with s_i(j) = scale_i where start_i <= u(j) < end_i, else 0.

    `injects`: inject_KBLD of each control, all of one shape. `starts`, `ends`: parts of the generation in [0, 1];
    None = all of it. u(j) = j/L, or k/S for the tokens of scale k of S if `sizes` gives the tokens per scale. Strength
    multiplies after the last MLP, as in ControlAR. Raises InputError on counts that do not pair up, on scales that are
    not finite and on windows that are empty or leave [0, 1].
    """
    starts = [0.0] * len(injects) if starts is None else starts
    ends = [1.0] * len(injects) if ends is None else ends
    for name, values in (("control-scale", scales), ("control-start", starts), ("control-end", ends)):
        if len(values) != len(injects):
            raise InputError(f"{len(values)} values of --{name} for {len(injects)} controls; give one for each")
    assert injects and all(inject.shape == injects[0].shape for inject in injects), [i.shape for i in injects]
    sizes = [1] * injects[0].shape[2] if sizes is None else sizes
    weighted = [inject * _strengths(inject, sizes, *window) for inject, *window in zip(injects, scales, starts, ends)]
    total = torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]
    return total.to(injects[0].dtype)


def _strengths(inject_KBLD: Tensor, sizes: Sequence[int], scale: float, start: float, end: float) -> Tensor:
    """s(j) as (L, 1), in float32 at least: 0.6 is no bfloat16 number."""
    if not math.isfinite(scale):
        raise InputError(f"--control-scale {scale}: needs a finite number; 1 is the trained strength, "
                         "0 switches the control off")
    if not 0 <= start < end <= 1:
        raise InputError(f"--control-start {start} --control-end {end}: needs 0 <= start < end <= 1; "
                         "0 and 1 cover the whole picture")
    values = [scale if start <= k / len(sizes) < end else 0.0 for k, size in enumerate(sizes) for _ in range(size)]
    dtype = torch.promote_types(inject_KBLD.dtype, torch.float32)
    return torch.tensor(values, dtype=dtype, device=inject_KBLD.device)[:, None]
