"""The head's loss and its gradients: all rows as released, and masked rows alone, which give the same loss."""

from __future__ import annotations

import torch

from tests.parity.checkers.mar_build import build_head
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    head = build_head(fixture.spec["config"], fixture.state_dict())
    times = fixture.spec["batch_mul"]
    z_BLD = fixture["in.z"].clone().requires_grad_(True)
    z_ND = z_BLD.flatten(0, 1).repeat(times, 1)
    target_NC = fixture["in.target"].flatten(0, 1).repeat(times, 1)
    mask_N = fixture["in.mask"].flatten().repeat(times).bool()
    t_N, noise_NC = fixture["in.t"], fixture["in.noise"]
    mse_N, bits_N = head.losses(target_NC, z_ND, t_N, noise_NC)
    fixture.compare("out.mse", mse_N)
    fixture.compare("out.vb", bits_N)
    mse_M, bits_M = head.losses(target_NC[mask_N], z_ND[mask_N], t_N[mask_N], noise_NC[mask_N])
    loss = (mse_M + bits_M).mean()
    fixture.compare("out.loss", loss)
    loss.backward()
    assert z_BLD.grad is not None
    fixture.compare("out.grad_z", z_BLD.grad)
    for name, linear in (("final", head.net.final_layer.linear), ("input", head.net.input_proj)):
        gradient = linear.weight.grad
        assert isinstance(gradient, torch.Tensor)
        fixture.compare(f"out.grad_{name}_weight", gradient)
