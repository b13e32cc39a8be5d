"""Colour regions: a picture in a few flat colours, as one would paint it by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import ControlType, Status, check_number

MAX_COLORS = 64
APART = 20.0        # RGB distance; colours nearer than this are one
ROUNDS = 4          # of k-means
BINS = 16 ** 3      # of the colour histogram: 4 bits a channel


class ColorRegions:
    """Flat regions in at most `colors` colours, details smaller than `detail` of the shorter side left out.

    colors: 1 to 64. detail: 0 to 0.2, the window of the median filters as a share of the picture's shorter side.
    """

    type: ClassVar = ControlType("color", "regions of flat colour", "the region's colour; white where nothing is",
                                 resample="nearest", background=(255, 255, 255))

    def __init__(self, colors: Any = 8, detail: Any = 0.04) -> None:
        self.colors = int(check_number("color colors", colors, 1, MAX_COLORS))
        self.detail = check_number("color detail", detail, 0, 0.2)

    def __call__(self, image: Image.Image) -> Image.Image:
        window = round(self.detail * min(image.size))
        return Image.fromarray(flat_colors(np.array(image.convert("RGB")), self.colors, window))

    @classmethod
    def status(cls) -> Status:
        return Status(True, "median filter and k-means, no weights; colors=8")


def flat_colors(pixels_HW3: np.ndarray, colors: int = 8, window: int = 5) -> np.ndarray:
    """uint8 (H, W, 3): median filter, k-means of the colours, median filter of the labels.

    `window`: side of the filters in pixels, rounded to an odd number; below 3 there is no filter. A median keeps edges
    where they are. Labels count down from the largest region's, so that the median of labels gives the thin seams
    between two regions, which have a rare colour of their own, to one of them.
    """
    window = min(window // 2 * 2 + 1, 255)
    smooth_HW3 = _median(pixels_HW3, window)
    bins_HW = (smooth_HW3.astype(np.int32) >> 4) @ np.array([256, 16, 1], np.int32)
    counts = np.bincount(bins_HW.ravel(), minlength=BINS)
    used_N = np.flatnonzero(counts)
    sums = (np.bincount(bins_HW.ravel(), smooth_HW3[..., c].ravel(), BINS)[used_N] for c in range(3))
    means_N3 = np.stack(list(sums), axis=1) / counts[used_N, None]
    labels = np.zeros(BINS, np.uint8)
    labels[used_N], palette_K3 = cluster(means_N3, counts[used_N], colors)
    return palette_K3[_median(labels[bins_HW], window)]


def cluster(points_N3: np.ndarray, weights_N: np.ndarray, colors: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels_N, palette_K3), K <= colors, by weighted k-means without chance. Label 0 has the greatest weight.

    A start is the colour that is farthest from the starts so far, in distance times the square root of its weight.
    A cluster's colour is that of its heaviest point, which leaves flat colours and white as they are.
    """
    centres_K3 = points_N3[weights_N.argmax()][None]
    for _ in range(colors - 1):
        distances_N = _distances(points_N3, centres_K3).min(axis=1)
        following = np.where(distances_N < APART ** 2, 0, distances_N * weights_N).argmax()
        if distances_N[following] < APART ** 2:
            break
        centres_K3 = np.concatenate([centres_K3, points_N3[following][None]])
    for _ in range(ROUNDS):
        members_NK = _members(points_N3, centres_K3) * weights_N[:, None]
        sums_K1 = members_NK.sum(axis=0)[:, None]
        centres_K3 = np.where(sums_K1 > 0, members_NK.T @ points_N3 / sums_K1.clip(1), centres_K3)
    members_NK = _members(points_N3, centres_K3) * weights_N[:, None]
    members_NK = members_NK[:, np.argsort(-members_NK.sum(axis=0), kind="stable")]
    return members_NK.argmax(axis=1), points_N3[members_NK.argmax(axis=0)].round().astype(np.uint8)


def _members(points_N3: np.ndarray, centres_K3: np.ndarray) -> np.ndarray:
    """(N, K), 1 at each point's nearest centre, else 0."""
    return np.eye(len(centres_K3))[_distances(points_N3, centres_K3).argmin(axis=1)]


def _distances(points_N3: np.ndarray, centres_K3: np.ndarray) -> np.ndarray:
    """Squared distances (N, K)."""
    return ((points_N3[:, None] - centres_K3) ** 2).sum(axis=2)


def _median(values: np.ndarray, window: int) -> np.ndarray:
    import cv2

    return values if window < 3 else cv2.medianBlur(values, window)
