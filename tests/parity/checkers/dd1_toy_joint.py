"""Noise pairs pushed through a two-token chain: the stored tokens, and a histogram of the exact joint law."""

from __future__ import annotations

import torch

from arimg.accel.flow import FlowSolver
from tests.chi_square import chi_square_p
from tests.parity.fixture import Fixture

AGREEING, P_VALUE = 0.995, 1e-3     # the fixture's own thresholds


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs, in float64."""
    solver, codebook_VC = FlowSolver(400), fixture["in.codebook"].double()
    noise_N2C = fixture["in.noise"].double()
    first_N = solver.codes(noise_N2C[:, 0], fixture["in.p1"].log().expand(len(noise_N2C), -1), codebook_VC)
    second_N = solver.codes(noise_N2C[:, 1], fixture["in.p2"].log()[first_N], codebook_VC)
    tokens_N2 = torch.stack([first_N, second_N], dim=1)
    agree_N = (tokens_N2 == fixture["out.tokens"]).all(1)
    assert agree_N[fixture["out.safe"].bool()].double().mean() >= AGREEING
    fixture.compare("out.tokens", tokens_N2)
    counts_VV = torch.zeros_like(fixture["out.joint"]).index_put_((first_N, second_N), torch.ones(1).double(), True)
    assert chi_square_p(counts_VV, fixture["out.joint"]) > P_VALUE
    assert chi_square_p(counts_VV.T, fixture["out.joint"]) < P_VALUE, "the test sees no difference of laws"
