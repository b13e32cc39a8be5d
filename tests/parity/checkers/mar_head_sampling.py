"""Ancestral sampling of the head, step by step. The second half of guided rows means nothing and is not compared.

pred_x0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), and 1 / sqrt(alpha_bar) is 2e4 at t = 999. There the
recorded values, made in float32, are up to 0.03 off the same network in float64, where the fixture's rule allows 0.001:
no computation meets it but one that rounds as that processor did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arimg.models.diffusion_head import DiffusionHead
from tests.parity.checkers.mar_build import build_head
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    head = build_head(fixture.spec["config"], fixture.state_dict())
    fixture.compare("out.timestep_map", torch.tensor(head.schedule.timesteps))
    for name, settings in fixture.spec["traces"].items():
        start_NC, steps_SNC = fixture[f"in.{name}.noise_init"], fixture[f"in.{name}.noise_steps"]
        rows, cfg, temperature = len(start_NC), settings["cfg"], settings["temperature"]
        z_GND = fixture[f"in.{name}.c"].unflatten(0, (-1, rows))
        noise_NSC = torch.cat([start_NC[:, None], steps_SNC[:, :rows].flip(0).transpose(0, 1)], dim=1)
        scales_GN = torch.full((len(z_GND), rows), cfg)
        steps = list(head.trajectory(z_GND, noise_NSC, scales_GN, temperature))
        sample = head.sample(z_GND, noise_NSC, scales_GN, temperature)
        traces = {"x_t": [step.x_NC for step in steps], "mean": [step.mean_NC for step in steps],
                  "log_variance": [step.log_variance_NC for step in steps], "pred_x0": [step.x0_NC for step in steps]}
        for output, tensors in traces.items():
            resolution = x0_resolution(head, traces["x_t"], cfg) if output == "pred_x0" else None
            compare_first(fixture, f"out.{name}.{output}", torch.stack(tensors), 1, resolution)
        compare_first(fixture, f"out.{name}.sample", sample.latents_NC, 0)


def x0_resolution(head: DiffusionHead, x_SNC: list[Tensor], cfg: float) -> Tensor:
    """Eight units in the last place of x_t / sqrt(alpha_bar), x_t and eps being of order one at least inside the
    network; guidance multiplies the errors of eps by 2 cfg - 1 at most."""
    factors_S = torch.tensor([step.alpha_bar ** -0.5 for step in reversed(head.schedule.steps)], dtype=torch.float64)
    sizes_SNC = torch.stack(x_SNC).double().abs().clamp(min=1)
    return 8 * torch.finfo(torch.float32).eps * max(1.0, 2 * cfg - 1) * factors_S[:, None, None] * sizes_SNC


def compare_first(fixture: Fixture, name: str, got: Tensor, dim: int, resolution: Tensor | None = None) -> None:
    """Compare with the first rows of the stored output."""
    fixture.tensors[name] = fixture.tensors[name].narrow(dim, 0, got.shape[dim])
    fixture.compare(name, got, resolution)
