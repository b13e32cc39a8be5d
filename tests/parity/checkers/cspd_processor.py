"""The released rule of accepting and replacing, on plain Gaussians; exact and printed log ratios."""

from __future__ import annotations

from arimg.accel.gaussians import Gaussian, log_ratio
from arimg.accel.relaxed import log_factor, relaxed_log_ratio, relaxed_residual, relaxed_result
from arimg.models.base import HeadSample
from tests.parity.checkers.var_sampling_filter import number
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    p, q = (Gaussian(fixture[f"in.{side}_mean"], fixture[f"in.{side}_std"]) for side in ("p", "q"))
    target, draft = (HeadSample(law.mean_NC, *law, fixture[f"in.{side}_logstd_sum"])
                     for side, law in (("p", p), ("q", q)))
    released_N, x_NC = log_factor(target, draft, "released"), fixture["in.x"]
    fixture.compare("out.fixed_term", released_N.exp())
    fixture.compare("out.exact_logratio", log_ratio(x_NC, p, q))
    printed_N = log_factor(target, draft, "printed")
    fixture.compare("out.paper_logratio", relaxed_log_ratio(x_NC, p, q, printed_N, 1.0))
    fixture.compare("out.residual_accept", relaxed_residual(fixture["in.proposal"], p, q, released_N))
    for name in fixture.outputs("ratio_T"):
        temperature = number(name.removeprefix("out.ratio_T"))
        fixture.compare(name, relaxed_log_ratio(x_NC, p, q, released_N, temperature).exp())
    for name in fixture.outputs("result_T"):
        temperature = number(name.removeprefix("out.result_T"))
        kept_N = relaxed_log_ratio(x_NC, p, q, released_N, temperature) > fixture["in.uniform"].double().log()
        result_NC, _ = relaxed_result(x_NC, kept_N, p, q, released_N,
                                      zip(fixture["in.prop_normal"], fixture["in.prop_uniform"]), overwrite=True)
        fixture.compare(name, result_NC)
