"""The decoder `cspd` on Gaussian chains with a closed-form law: kept drafts, law of one token and of two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg.accel.continuous import Cspd
from arimg.accel.target import Target
from tests.exactness.linear import Chain, ChainHead, LinearCausal, Setup
from tests.exactness.statistics import ks_normal, moment_errors
from tests.parity.fixture import Fixture

COUNT = 200_000
LIMIT = 1e-3


def check(fixture: Fixture) -> None:
    """Every output is statistical: its law is tested here."""
    check_one_token(fixture)
    check_two_tokens(fixture)


def check_one_token(fixture: Fixture) -> None:
    """KS against the law, and the acceptance where both have the same standard deviations."""
    coef_S, std_S = fixture["in.coef"], fixture["in.std_target"]
    target = Chain(coef_S, fixture["in.shift_target"], std_S)
    mean, variance = target.law()
    assert math.isclose(mean, float(fixture["out.mean"]), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(variance, float(fixture["out.var"]), rel_tol=1e-9)
    for name in ("target", "draft"):
        draft = Chain(coef_S, fixture["in.shift_draft"], fixture[f"in.std_{name}"])
        tokens_B1, acceptance = decode(single(target), single(draft), COUNT)
        assert ks_normal(tokens_B1[:, 0], mean, variance) > LIMIT, name
        if name == "target":
            expected = float(fixture["out.accept_equal_std"])
            error = math.sqrt(expected * (1 - expected) / COUNT)
            assert abs(acceptance - expected) < 4 * error, (acceptance, expected)


def check_two_tokens(fixture: Fixture) -> None:
    """Mean and covariance of the pair."""
    rho, std, rho_q, bias_q, std_q, first_q, first_std_q = fixture["in.ar"].tolist()
    target = pair(1.0, 0.0, rho, 0.0, std)
    draft = pair(first_std_q, first_q, rho_q, bias_q, std_q)
    tokens_B2, _ = decode(target, draft, COUNT)
    covariance = fixture["out.ar_cov"]
    assert moment_errors(tokens_B2, torch.zeros(2, dtype=torch.float64), covariance) < 4


def decode(target: LinearCausal, draft: LinearCausal, count: int) -> tuple[Tensor, float]:
    """(tokens_BL, acceptance)."""
    request = Setup(count, len(target.bias_L)).request()
    result = Cspd(draft, window=2).decode(Target(target, request), request)
    assert result.latents_BLC is not None
    return result.latents_BLC[..., 0], result.stats.extra["acceptance"]


def single(chain: Chain) -> LinearCausal:
    """One token from the chain."""
    zero = torch.zeros(1, dtype=torch.float64)
    return LinearCausal(ChainHead(chain), zero[None], zero)


def pair(first_std: float, first_mean: float, rho: float, bias: float, std: float) -> LinearCausal:
    """Two tokens: x1 ~ N(first_mean, first_std^2), x2 given x1 ~ N(rho x1 + bias, std^2)."""
    numbers = torch.tensor([[first_mean, bias], [first_std, std]], dtype=torch.float64)
    weights_LL = torch.tensor([[0.0, 0.0], [rho, 0.0]], dtype=torch.float64)
    one_S = torch.ones(1, dtype=torch.float64)
    return LinearCausal(ChainHead(Chain(0 * one_S, 0 * one_S, one_S)), weights_LL, numbers[0], factors_L=numbers[1])
