"""How well a picture keeps to its control image.

Edges are compared with a tolerance of one pixel (3x3 neighbourhood). Precision: the share of the picture's edge pixels
with a given edge pixel in their neighbourhood. Recall: the share of the given edge pixels with an edge pixel of the
picture in theirs. F1: their harmonic mean. All three are taken per picture and then averaged over pictures.
Neither side has an edge: all three are 1. Only one side has: all three are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from arimg.control.base import Extractor
from arimg.control.canny import Canny

LINE_LEVEL = 128            # from this grey level on, a pixel of a drawn map is part of a line (ControlAR's threshold)


class Region(NamedTuple):
    """A window of a picture, as parts of its height and width."""

    top: float = 0.0
    bottom: float = 1.0
    left: float = 0.0
    right: float = 1.0

    def of(self, maps_NHW: np.ndarray) -> np.ndarray:
        """The window of each map, a view."""
        height, width = maps_NHW.shape[1:3]
        return maps_NHW[:, round(self.top * height):round(self.bottom * height),
                        round(self.left * width):round(self.right * width)]


class EdgeScores(NamedTuple):
    """One value per picture, float64 in [0, 1]."""

    f1: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def edge_scores(painted_NHW: np.ndarray, given_NHW: np.ndarray, region: Region = Region()) -> EdgeScores:
    """Scores of the painted edges (bool) against the given ones. Only edges in `region` count; their counterparts may
    lie one pixel outside it."""
    matched = (painted_NHW & dilate(given_NHW), given_NHW & dilate(painted_NHW))
    painted_right_N, given_found_N = (region.of(edges_NHW).sum((1, 2)) for edges_NHW in matched)
    painted_N, given_N = (region.of(edges_NHW).sum((1, 2)) for edges_NHW in (painted_NHW, given_NHW))
    precision_N, recall_N = painted_right_N / np.maximum(painted_N, 1), given_found_N / np.maximum(given_N, 1)
    for values_N in (precision_N, recall_N):
        values_N[(painted_N == 0) | (given_N == 0)] = 0.0
        values_N[(painted_N == 0) & (given_N == 0)] = 1.0
    f1_N = 2 * precision_N * recall_N / np.maximum(precision_N + recall_N, 1e-12)
    return EdgeScores(f1_N, precision_N, recall_N)


def dilate(edges_NHW: np.ndarray) -> np.ndarray:
    """Every pixel with an edge pixel in its 3x3 neighbourhood."""
    padded = np.pad(edges_NHW, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] | padded[:, 1:-1] | padded[:, 2:]
    return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]


def canny_edges(pixels_NHW3: np.ndarray) -> np.ndarray:
    """edges_NHW bool of uint8 pictures, with the thresholds of the control type (100 and 200)."""
    return extracted(pixels_NHW3, Canny())[..., 0] > 0


def lines_of_maps(maps_NHW3: np.ndarray, type_name: str) -> np.ndarray:
    """edges_NHW bool that control images ask for: the borders of colour regions, else pixels from LINE_LEVEL on."""
    if type_name == "color":
        return canny_edges(maps_NHW3)
    return maps_NHW3.max(-1) >= LINE_LEVEL


def extracted(pixels_NHW3: np.ndarray, extractor: Extractor) -> np.ndarray:
    """maps_NHW3 uint8: the control image of each picture."""
    return np.stack([np.asarray(extractor(Image.fromarray(pixels_HW3))) for pixels_HW3 in pixels_NHW3])


def map_differences(painted_NHW3: np.ndarray, given_NHW3: np.ndarray, extractor: Extractor) -> np.ndarray:
    """differences_N: mean absolute difference, in grey levels of 0 to 255, between the map extracted from the painted
    picture and the given map."""
    found_NHW3 = extracted(painted_NHW3, extractor)
    return np.abs(found_NHW3.astype(np.float64) - given_NHW3).mean((1, 2, 3))
