"""The other figures of the ImageNet protocol: Inception score, precision and recall.

Inception score (Salimans et al. 2016): exp(mean KL(p(y|x) || p(y))), averaged over blocks of 5,000 pictures.
Precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2): the share of samples within the manifold of the reference,
and of the reference within that of the samples. A manifold is the union of balls about its pictures, each as large as
the distance to the third nearest other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arimg.errors import InputError
from arimg.evals.bootstrap import Figure, draws, figure, mean_figure

SCORE_BLOCK = 5000
SCORE_ROUNDS = 200
NEIGHBOUR = 3
ROWS = 1000                 # pictures whose distances to ROWS others are held at once


def inception_score(logits_NK: np.ndarray, seed: int = 0) -> Figure:
    """Of classifier outputs without bias (ADM's evaluator leaves it out). Pictures are dealt to blocks in an order that
    is always the same and has nothing to do with theirs: blocks of a class-sorted set would hold few classes each."""
    order_N = np.random.default_rng(0).permutation(len(logits_NK))
    blocks = np.array_split(order_N, max(1, round(len(logits_NK) / SCORE_BLOCK)))
    found = np.array([_block_scores(logits_NK[np.sort(block)], seed) for block in blocks])
    value, *resampled = found.mean(0)
    return figure(value, resampled, lowest=1.0)


def _block_scores(logits_NK: np.ndarray, seed: int) -> list[float]:
    """The score of a block, then those of its resampled versions."""
    log_p_NK = torch.from_numpy(logits_NK).double().log_softmax(1).numpy()
    p_NK = np.exp(log_p_NK)
    negentropy_N = (p_NK * log_p_NK).sum(1)

    def score(weights_N: np.ndarray) -> float:
        p_K = weights_N @ p_NK
        return float(np.exp(weights_N @ negentropy_N - (p_K * np.log(np.maximum(p_K, 1e-300))).sum()))

    count = len(logits_NK)
    resampled = (score(counts_N / count) for counts_N in draws(count, SCORE_ROUNDS, seed))
    return [score(np.full(count, 1 / count)), *resampled]


class PrecisionRecall(NamedTuple):
    """Shares of samples and of reference pictures."""

    precision: Figure
    recall: Figure


def precision_recall(samples_NC: np.ndarray, reference_MC: np.ndarray, seed: int = 0,
                     device: str | torch.device = "cpu") -> PrecisionRecall:
    """Raises InputError when a set has too few pictures for a third neighbour."""
    for name, features in (("samples", samples_NC), ("the reference", reference_MC)):
        if len(features) <= NEIGHBOUR:
            raise InputError(f"precision and recall: {name} has {len(features)} pictures, and each needs "
                             f"{NEIGHBOUR} others; give more")
    precise_N = within(samples_NC, reference_MC, squared_radii(reference_MC, device), device)
    recalled_M = within(reference_MC, samples_NC, squared_radii(samples_NC, device), device)
    return PrecisionRecall(mean_figure(precise_N, seed), mean_figure(recalled_M, seed))


def squared_radii(features_NC: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """radii_N float64: squared distance of each point to its third nearest other one."""
    radii = []
    for rows_BC in _pieces(features_NC, device):
        nearest_BK = torch.empty(len(rows_BC), 0, dtype=torch.float64, device=device)
        for others_MC in _pieces(features_NC, device):
            joined = torch.cat([nearest_BK, _squared_distances(rows_BC, others_MC)], 1)
            nearest_BK = joined.topk(min(NEIGHBOUR + 1, joined.shape[1]), largest=False).values
        radii.append(nearest_BK[:, NEIGHBOUR].cpu().numpy())          # the point itself comes first
    return np.concatenate(radii)


def within(points_NC: np.ndarray, centres_MC: np.ndarray, squared_radii_M: np.ndarray,
           device: str | torch.device = "cpu") -> np.ndarray:
    """inside_N bool: whether each point lies in a ball, its surface included."""
    inside = []
    for rows_BC in _pieces(points_NC, device):
        found_B = torch.zeros(len(rows_BC), dtype=torch.bool, device=device)
        first = 0
        for centres_PC in _pieces(centres_MC, device):
            radii_P = torch.from_numpy(squared_radii_M[first:first + len(centres_PC)]).to(device)
            found_B |= (_squared_distances(rows_BC, centres_PC) <= radii_P).any(1)
            first += len(centres_PC)
        inside.append(found_B.cpu().numpy())
    return np.concatenate(inside)


def _pieces(features_NC: np.ndarray, device: str | torch.device) -> Iterator[Tensor]:
    for first in range(0, len(features_NC), ROWS):
        yield torch.from_numpy(features_NC[first:first + ROWS].astype(np.float64)).to(device)


def _squared_distances(a_NC: Tensor, b_MC: Tensor) -> Tensor:
    """|a|^2 + |b|^2 - 2 a.b in float64, which keeps 1e-12 of the norms."""
    return (a_NC.square().sum(1)[:, None] + b_MC.square().sum(1) - 2 * a_NC @ b_MC.T).clamp_min(0)
