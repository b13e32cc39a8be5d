"""The closed-form conditional score of a teacher over its codebook."""

from __future__ import annotations

import math

import torch

from arimg.accel.flow import log_density, posterior, posterior_mean, score, score_of_velocity, velocity
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all outputs, in float64."""
    p_NV = fixture["in.probs"].double()
    x_NC, t_N1 = fixture["in.x"].double().requires_grad_(), fixture["in.t"].double()
    point = (x_NC, t_N1, (p_NV / p_NV.sum(-1, keepdim=True)).log(), fixture["in.codebook"].double())
    constant_N = x_NC.shape[-1] / 2 * (2 * math.pi * t_N1[..., 0] ** 2).log()
    fixture.compare("out.posterior", posterior(*point))
    fixture.compare("out.x0_mean", posterior_mean(*point))
    fixture.compare("out.score", score(*point))
    v_NC = velocity(*point)
    fixture.compare("out.velocity", v_NC)
    torch.testing.assert_close(score_of_velocity(v_NC, x_NC, t_N1), score(*point))
    fixture.compare("out.log_density_unnorm", log_density(*point) + constant_N)
    fixture.compare("out.velocity_vjp", torch.autograd.grad(v_NC, x_NC, fixture["in.cotangent"].double())[0])
