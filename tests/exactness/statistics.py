"""Tests of samples against laws, and against other samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arimg.accel.audit import ks_uniform


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x)."""
    return torch.special.erfc(-x / math.sqrt(2)) / 2


def ks_normal(x_N: Tensor, mean: float, variance: float) -> float:
    """p-value of Kolmogorov and Smirnov's test against N(mean, variance)."""
    return ks_uniform(normal_cdf((x_N.double() - mean) / math.sqrt(variance)))


def ks_two(x_N: Tensor, y_N: Tensor) -> float:
    """p-value of the two-sample test of Kolmogorov and Smirnov (asymptotic)."""
    both = torch.cat([x_N, y_N]).double().sort().values
    cdfs = [torch.searchsorted(one.double().sort().values, both, right=True) / len(one) for one in (x_N, y_N)]
    distance = float((cdfs[0] - cdfs[1]).abs().max())
    effective = math.sqrt(len(x_N) * len(y_N) / (len(x_N) + len(y_N)))
    scaled = (effective + 0.12 + 0.11 / effective) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))))


def mmd(x_ND: Tensor, y_ND: Tensor, permutations: int = 2000, seed: int = 0) -> float:
    """p-value of the unbiased MMD test: RBF kernel with the median distance as width, by permutation. It is never below
    1 / (1 + permutations), so the 500 of the specification could not reach its limit of 1e-3."""
    both, count = torch.cat([x_ND, y_ND]).double(), len(x_ND)
    square = torch.cdist(both, both).square_()
    kernel = square.div_(-square[square > 0].median()).exp_().fill_diagonal_(0)
    generator, rest, total = torch.Generator().manual_seed(seed), len(both) - count, kernel.sum()
    observed, hits, done = None, 0, 0
    while done <= permutations:
        orders = [torch.randperm(len(both), generator=generator) for _ in range(min(500, permutations + 1 - done))]
        if observed is None:
            orders[0] = torch.arange(len(both))
        sides_PN = torch.zeros(len(orders), len(both), dtype=torch.float64)
        sides_PN.scatter_(1, torch.stack(orders)[:, :count], 1.0)
        weighted_PN = sides_PN @ kernel
        within_P = (weighted_PN * sides_PN).sum(1)
        across_P = weighted_PN.sum(1) - within_P
        other_P = total - within_P - 2 * across_P
        values_P = within_P / count / (count - 1) + other_P / rest / (rest - 1) - 2 * across_P / count / rest
        observed = values_P[0] if observed is None else observed
        hits, done = hits + int((values_P >= observed).sum()), done + len(orders)
    return hits / (1 + permutations)        # the observed order is one of the hits


def moment_errors(x_NL: Tensor, mean_L: Tensor, covariance_LL: Tensor) -> float:
    """The largest deviation of sample mean and covariance, in their standard errors."""
    count = len(x_NL)
    centred = x_NL.double() - mean_L
    mean_error = centred.mean(0) / (covariance_LL.diagonal() / count).sqrt()
    products = torch.einsum("ni,nj->nij", centred, centred)
    variances = covariance_LL.diagonal()[:, None] * covariance_LL.diagonal() + covariance_LL.square()
    covariance_error = (products.mean(0) - covariance_LL) / (variances / count).sqrt()
    return float(torch.maximum(mean_error.abs().max(), covariance_error.abs().max()))
