"""Distances between two sets of pictures, taken between the laws of their features.

Frechet distance (Heusel et al. 2017, eq. 6): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).
KID (Binkowski et al. 2018, section 3): unbiased MMD^2 with the kernel (x.y / C + 1)^3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from arimg.evals.bootstrap import Figure, draws, figure

FRECHET_ROUNDS = 200        # each takes an eigenvalue problem


class Moments:
    """Mean and covariance of features that come in batches, summed in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean_C = np.zeros(channels)
        self._scatter_CC = np.zeros((channels, channels))

    def update(self, features_BC: np.ndarray) -> Moments:
        """Take in a batch. Returns self."""
        features_BC = np.asarray(features_BC, np.float64)
        mean_C = features_BC.mean(0)
        centred_BC = features_BC - mean_C
        count = self.count + len(features_BC)
        shift_C = mean_C - self.mean_C
        self._scatter_CC += centred_BC.T @ centred_BC
        self._scatter_CC += np.outer(shift_C, shift_C) * (self.count * len(features_BC) / count)
        self.mean_C = self.mean_C + shift_C * (len(features_BC) / count)
        self.count = count
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
    """The distance of a law to the reference's, >= 0. tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of
    the symmetric C2^(1/2) C1 C2^(1/2), which are those of C1 C2."""
    values_C = np.linalg.eigvalsh(reference.root_CC @ covariance_CC @ reference.root_CC)
    traces = np.trace(covariance_CC) + np.trace(reference.covariance_CC) - 2 * np.sqrt(values_C.clip(0)).sum()
    return float(max(0.0, ((mean_C - reference.mean_C) ** 2).sum() + traces))


def frechet_figure(features_NC: np.ndarray, reference: Gaussian, seed: int = 0) -> Figure:
    """The distance of a set of pictures to the reference. The interval is about the set; the reference is taken as
    given."""
    features_NC = features_NC.astype(np.float64)
    whole = Moments(features_NC.shape[1]).update(features_NC)
    resampled = []
    for counts_N in draws(len(features_NC), FRECHET_ROUNDS, seed):
        mean_C = counts_N @ features_NC / counts_N.sum()
        centred_NC = features_NC - mean_C
        covariance_CC = (centred_NC * counts_N[:, None]).T @ centred_NC / (counts_N.sum() - 1)
        resampled.append(frechet_distance(mean_C, covariance_CC, reference))
    return figure(frechet_distance(whole.mean_C, whole.covariance_CC, reference), resampled, lowest=0.0)


def kid_figure(features_NC: np.ndarray, reference_MC: np.ndarray, seed: int = 0) -> Figure:
    """Unbiased MMD^2 between two sets; it may be negative. A picture drawn twice in a round is not compared with
    itself, which would bias the round."""
    features_NC, reference_MC = features_NC.astype(np.float64), reference_MC.astype(np.float64)
    own_NN, other_MM = _kernel(features_NC, features_NC), _kernel(reference_MC, reference_MC)
    cross_N = _kernel(features_NC, reference_MC).mean(1)
    own_N = np.diagonal(own_NN)
    reference = (other_MM.sum() - np.trace(other_MM)) / (len(other_MM) * (len(other_MM) - 1))

    def distances(counts_RN: np.ndarray) -> np.ndarray:
        pairs_R = (counts_RN @ own_NN * counts_RN).sum(1) - counts_RN ** 2 @ own_N
        number_R = counts_RN.sum(1) ** 2 - (counts_RN ** 2).sum(1)
        return pairs_R / number_R - 2 * counts_RN @ cross_N / counts_RN.sum(1) + reference

    count = len(features_NC)
    rounds_RN = draws(count, seed=seed)
    rounds_RN = rounds_RN[rounds_RN.max(1) < count]         # one picture alone makes no pair
    return figure(distances(np.ones((1, count)))[0], distances(rounds_RN))


def _kernel(a_NC: np.ndarray, b_MC: np.ndarray) -> np.ndarray:
    return (a_NC @ b_MC.T / a_NC.shape[1] + 1) ** 3
