"""The flow over a codebook: posterior, velocity, Euler and Heun states, the exact trajectory."""

from __future__ import annotations

from itertools import pairwise

import torch

from arimg.accel.flow import FlowSolver, nearest, posterior, posterior_mean, velocity
from tests.parity.fixture import Fixture

FINE = 4000     # steps that stand for the exact trajectory


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs, in float64."""
    p_NV = fixture["in.probs"].double()
    law = ((p_NV / p_NV.sum(-1, keepdim=True)).log(), fixture["in.codebook"].double())
    point = (fixture["in.x"].double(), fixture["in.t"].double(), *law)
    fixture.compare("out.posterior", posterior(*point))
    fixture.compare("out.x0_mean", posterior_mean(*point))
    fixture.compare("out.velocity", velocity(*point))
    noise_NC, times = fixture["in.noise"].double(), fixture["in.times"].tolist()
    for method in ("euler", "heun"):
        solver = FlowSolver(len(times) - 1, method)
        states_TNC = torch.stack(list(solver.trajectory(noise_NC, *law, times)))
        fixture.compare(f"out.{method}_states", states_TNC)
        fixture.compare(f"out.{method}_token", nearest(states_TNC[-1], law[1]))
        fixture.compare(f"out.{method}_token", solver.codes(noise_NC, *law))
    check_exact(fixture, law)


def check_exact(fixture: Fixture, law: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Two fine Heun runs through the recorded times, extrapolated (Richardson: the error is of second order)."""
    noise_NC, recorded = fixture["in.noise"].double(), fixture["in.record_times"].tolist()
    coarse_TNC, fine_TNC = (recorded_states(noise_NC, law, recorded, steps) for steps in (FINE // 2, FINE))
    fixture.compare("out.exact_states", (4 * fine_TNC - coarse_TNC) / 3)
    codes_N = FlowSolver(FINE).codes(noise_NC, *law)
    fixture.compare("out.exact_token", codes_N)
    safe_N1 = fixture["out.token_is_safe"].bool()[:, None]
    fixture.compare("out.exact_embedding", torch.where(safe_N1, law[1][codes_N], fixture["out.exact_embedding"]))


def recorded_states(noise_NC: torch.Tensor, law: tuple[torch.Tensor, torch.Tensor], recorded: list[float],
                    steps: int) -> torch.Tensor:
    """(T, N, C): Heun states at the recorded times, between which all steps are equal and about 1 / steps."""
    times = [1.0]
    for t, s in pairwise([1.0, *recorded]):
        count = round((t - s) * steps)
        times += [t + (s - t) * k / count for k in range(1, count)] + [s] * (s < t)
    states = dict(zip(times, FlowSolver().trajectory(noise_NC, *law, times)))
    return torch.stack([states[t] for t in recorded])
