"""Batches as functions of (seed, step): any process can make any batch, and a resumed run repeats nothing."""

from __future__ import annotations

import numpy as np


def batch_rng(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    """The generator of one batch's augmentations."""
    return np.random.default_rng([seed, 2, step, rank])


def random_crops(pixels_NHW3: np.ndarray, indices: np.ndarray, crop: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (B, crop, crop, 3): a random window of each image, flipped left to right half of the time."""
    height, width = pixels_NHW3.shape[1:3]
    tops = rng.integers(0, height - crop + 1, len(indices))
    lefts = rng.integers(0, width - crop + 1, len(indices))
    flips = rng.random(len(indices)) < 0.5
    windows = (pixels_NHW3[i, t:t + crop, left:left + crop] for i, t, left in zip(indices, tops, lefts))
    return np.stack([window[:, ::-1] if flip else window for window, flip in zip(windows, flips)])


def balanced_indices(labels_N: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """(batch_size,) indices drawn so that a class of n samples gets a share proportional to sqrt(n)."""
    counts = np.bincount(labels_N)
    weights_N = counts[labels_N] ** -0.5
    return rng.choice(len(labels_N), batch_size, p=weights_N / weights_N.sum())
