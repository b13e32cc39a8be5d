"""Ancestral sampling of the head, step by step. The second half of guided rows means nothing and is not compared."""

from __future__ import annotations

import torch
from torch import Tensor

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
            compare_first(fixture, f"out.{name}.{output}", torch.stack(tensors), dim=1)
        compare_first(fixture, f"out.{name}.sample", sample.latents_NC, dim=0)


def compare_first(fixture: Fixture, name: str, got: Tensor, dim: int) -> None:
    """Compare with the first rows of the stored output."""
    fixture.tensors[name] = fixture.tensors[name].narrow(dim, 0, got.shape[dim])
    fixture.compare(name, got)
