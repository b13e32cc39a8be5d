"""Do these counts follow that law?"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 5.0        # expected counts below it are pooled


def chi_square_p(counts: Tensor, law: Tensor) -> float:
    """p-value of Pearson's test of counts against probabilities of the same shape; rare cells are pooled."""
    counts_K, expected_K = counts.double().flatten(), law.double().flatten() * counts.sum()
    if bool((counts_K[expected_K == 0] > 0).any()):
        return 0.0
    rare_K = expected_K < FEWEST
    observed = torch.cat([counts_K[~rare_K], counts_K[rare_K].sum()[None]])
    expected = torch.cat([expected_K[~rare_K], expected_K[rare_K].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def total_variation(counts: Tensor, law: Tensor) -> float:
    """Half the L1 distance of the counts' frequencies from the law."""
    return float((counts.double() / counts.sum() - law).abs().sum() / 2)


def sampling_floor(law: Tensor, count: int) -> float:
    """Expected total variation of `count` true samples of the law from it (normal approximation)."""
    return float((law * (1 - law) / count).sqrt().sum() / (2 * torch.pi) ** 0.5)
