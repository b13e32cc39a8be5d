"""Distances between two sets of pictures, taken between the laws of their features.

Frechet distance (Heusel et al. 2017, eq. 6): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).
KID (Binkowski et al. 2018, section 3): unbiased MMD^2 with the kernel (x.y / C + 1)^3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from arimg.evals.bootstrap import Figure, draws, figure

FRECHET_ROUNDS = 200        # each takes an eigenvalue problem
CHUNK = 1000                # rows that are read at once
KID_PICTURES = 5000         # of each set at most: the kernel is taken between all pairs


class Moments:
    """Mean and covariance of features that come in batches, summed in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean_C = np.zeros(channels)
        self._scatter_CC = np.zeros((channels, channels))

    @classmethod
    def of(cls, features_NC: np.ndarray, counts_N: np.ndarray | None = None) -> Moments:
        """Of all rows, read in pieces: a memory map need not fit into memory. `counts_N`: as `update`."""
        moments = cls(features_NC.shape[1])
        for first in range(0, len(features_NC), CHUNK):
            rows = slice(first, first + CHUNK)
            moments.update(features_NC[rows], None if counts_N is None else counts_N[rows])
        return moments

    def update(self, features_BC: np.ndarray, counts_B: np.ndarray | None = None) -> Moments:
        """Take in a batch, each row once or `counts_B` times. Returns self."""
        features_BC = np.asarray(features_BC, np.float64)
        weights_B = np.ones(len(features_BC)) if counts_B is None else counts_B.astype(np.float64)
        added = weights_B.sum()
        if added == 0:
            return self
        mean_C = weights_B @ features_BC / added
        centred_BC = features_BC - mean_C
        count = self.count + added
        shift_C = mean_C - self.mean_C
        self._scatter_CC += (centred_BC * weights_B[:, None]).T @ centred_BC
        self._scatter_CC += np.outer(shift_C, shift_C) * (self.count * added / count)
        self.mean_C = self.mean_C + shift_C * (added / count)
        self.count = int(count)
        return self

    @property
    def covariance_CC(self) -> np.ndarray:
        """With count - 1 in the denominator."""
        return self._scatter_CC / max(1, self.count - 1)


class Gaussian(NamedTuple):
    """Mean, covariance, and the square root of the covariance."""

    mean_C: np.ndarray
    covariance_CC: np.ndarray
    root_CC: np.ndarray

    @classmethod
    def of(cls, mean_C: np.ndarray, covariance_CC: np.ndarray) -> Gaussian:
        """With the root computed."""
        values_C, vectors_CC = np.linalg.eigh(covariance_CC)
        return cls(mean_C, covariance_CC, (vectors_CC * np.sqrt(values_C.clip(0))) @ vectors_CC.T)


def frechet_distance(mean_C: np.ndarray, covariance_CC: np.ndarray, reference: Gaussian) -> float:
    """The distance of a law to the reference's, >= 0; NaN for moments that are no numbers. tr (C1 C2)^(1/2) is the sum
    of the roots of the eigenvalues of the symmetric C2^(1/2) C1 C2^(1/2), which are those of C1 C2."""
    if not (np.isfinite(mean_C).all() and np.isfinite(covariance_CC).all()):
        return float("nan")
    values_C = np.linalg.eigvalsh(reference.root_CC @ covariance_CC @ reference.root_CC)
    traces = np.trace(covariance_CC) + np.trace(reference.covariance_CC) - 2 * np.sqrt(values_C.clip(0)).sum()
    return float(max(0.0, ((mean_C - reference.mean_C) ** 2).sum() + traces))


def frechet_figure(features_NC: np.ndarray, reference: Gaussian, seed: int = 0,
                   rounds: int = FRECHET_ROUNDS) -> Figure:
    """The distance of a set of pictures to the reference. The interval is about the set; the reference is taken as
    given. Memory does not grow with the number of pictures."""
    def distance(counts_N: np.ndarray | None = None) -> float:
        moments = Moments.of(features_NC, counts_N)
        return frechet_distance(moments.mean_C, moments.covariance_CC, reference)

    return figure(distance(), map(distance, draws(len(features_NC), rounds, seed)), lowest=0.0)


def kid_figure(features_NC: np.ndarray, reference_MC: np.ndarray, seed: int = 0) -> Figure:
    """Unbiased MMD^2 between two sets; it may be negative. Of a set with more than KID_PICTURES, that many are chosen,
    always the same. A picture drawn twice in a round is not compared with itself, which would bias the round."""
    features_NC, reference_MC = _chosen(features_NC), _chosen(reference_MC)
    own_NN, other_MM = _kernel(features_NC, features_NC), _kernel(reference_MC, reference_MC)
    cross_N = _kernel(features_NC, reference_MC).mean(1)
    own_N = np.diagonal(own_NN)
    reference = (other_MM.sum() - np.trace(other_MM)) / (len(other_MM) * (len(other_MM) - 1))

    def distances(counts_RN: np.ndarray) -> np.ndarray:
        pairs_R = (counts_RN @ own_NN * counts_RN).sum(1) - counts_RN ** 2 @ own_N
        number_R = counts_RN.sum(1) ** 2 - (counts_RN ** 2).sum(1)
        return pairs_R / number_R - 2 * counts_RN @ cross_N / counts_RN.sum(1) + reference

    count = len(features_NC)
    rounds_RN = np.stack([*draws(count, seed=seed)])
    rounds_RN = rounds_RN[rounds_RN.max(1) < count]         # one picture alone makes no pair
    return figure(distances(np.ones((1, count)))[0], distances(rounds_RN))


def _chosen(features_NC: np.ndarray) -> np.ndarray:
    rows = np.random.default_rng(0).permutation(len(features_NC))[:KID_PICTURES]
    return features_NC[np.sort(rows)].astype(np.float64)


def _kernel(a_NC: np.ndarray, b_MC: np.ndarray) -> np.ndarray:
    return (a_NC @ b_MC.T / a_NC.shape[1] + 1) ** 3
