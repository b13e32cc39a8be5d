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


def mmd(x_ND: Tensor, y_ND: Tensor, permutations: int = 500, seed: int = 0) -> float:
    """p-value of the unbiased MMD test: RBF kernel with the median distance as width, by permutation."""
    both, count = torch.cat([x_ND, y_ND]).double(), len(x_ND)
    square = torch.cdist(both, both).square()
    kernel = torch.exp(-square / square[square > 0].median()).fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    size, values = len(both), []
    for turn in range(permutations + 1):
        order = torch.arange(size) if turn == 0 else torch.randperm(size, generator=generator)
        side = torch.zeros(size, dtype=torch.float64)
        side[order[:count]] = 1.0
        weighted = kernel @ side
        within = side @ weighted
        across = (1 - side) @ weighted
        other = kernel.sum() - within - 2 * across
        rest = size - count
        values.append(float(within / count / (count - 1) + other / rest / (rest - 1) - 2 * across / count / rest))
    return (1 + sum(value >= values[0] for value in values[1:])) / (1 + permutations)


def moment_errors(x_NL: Tensor, mean_L: Tensor, covariance_LL: Tensor) -> float:
    """The largest deviation of sample mean and covariance, in their standard errors."""
    count = len(x_NL)
    centred = x_NL.double() - mean_L
    mean_error = centred.mean(0) / (covariance_LL.diagonal() / count).sqrt()
    products = torch.einsum("ni,nj->nij", centred, centred)
    variances = covariance_LL.diagonal()[:, None] * covariance_LL.diagonal() + covariance_LL.square()
    covariance_error = (products.mean(0) - covariance_LL) / (variances / count).sqrt()
    return float(torch.maximum(mean_error.abs().max(), covariance_error.abs().max()))
