"""How well a picture keeps to its control image.

Edges are compared with a tolerance of one pixel (3x3 neighbourhood). Precision: the share of the picture's edge pixels
with a given edge pixel in their neighbourhood. Recall: the share of the given edge pixels with an edge pixel of the
picture in theirs. F1: their harmonic mean. All three are taken per picture and then averaged over pictures.
Neither side has an edge: all are 1. Only one side has: all are 0.

Of the other types the map extracted from the picture is compared with the given one, as ControlAR does: soft edges and
lines by MS-SSIM (Wang et al. 2003), depth by the root mean squared error, classes by the mean intersection over union.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arimg.control.base import Extractor
from arimg.control.canny import Canny
from arimg.errors import MissingExtraError
from arimg.evals.bootstrap import Figure, draws, figure, mean_figure

LINE_LEVEL = 128            # from this grey level on, a pixel of a drawn map is part of a line (ControlAR's threshold)
SOFT_TYPES = ("hed", "softedge", "lineart")
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)       # weights of MS-SSIM (Wang et al. 2003, section 4)
SSIM_WINDOW = 11


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
    f1_exact: np.ndarray        # without tolerance, as ControlAR counts


def edge_scores(painted_NHW: np.ndarray, given_NHW: np.ndarray, region: Region = Region()) -> EdgeScores:
    """Scores of the painted edges (bool) against the given ones. Only edges in `region` count; their counterparts may
    lie one pixel outside it."""
    matched = (painted_NHW & dilate(given_NHW), given_NHW & dilate(painted_NHW), painted_NHW & given_NHW)
    painted_right_N, given_found_N, both_N = (region.of(edges_NHW).sum((1, 2)) for edges_NHW in matched)
    painted_N, given_N = (region.of(edges_NHW).sum((1, 2)) for edges_NHW in (painted_NHW, given_NHW))
    precision_N, recall_N = painted_right_N / np.maximum(painted_N, 1), given_found_N / np.maximum(given_N, 1)
    for values_N in (precision_N, recall_N):
        values_N[(painted_N == 0) | (given_N == 0)] = 0.0
        values_N[(painted_N == 0) & (given_N == 0)] = 1.0
    f1_N = 2 * precision_N * recall_N / np.maximum(precision_N + recall_N, 1e-12)
    exact_N = np.where(painted_N + given_N > 0, 2 * both_N / np.maximum(painted_N + given_N, 1), 1.0)
    return EdgeScores(f1_N, precision_N, recall_N, exact_N)


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


def check_map_scores(type_name: str) -> None:
    """Raises MissingExtraError when a package is missing that `map_scores` needs: before the long work."""
    if type_name in SOFT_TYPES and find_spec("torchmetrics") is None:
        raise MissingExtraError("eval", "torchmetrics", "MS-SSIM")


def map_scores(type_name: str, found_NHW3: np.ndarray, given_NHW3: np.ndarray, seed: int = 0) -> dict[str, Figure]:
    """The maps extracted from pictures (uint8) against the given ones: `map_difference`, and what is customary for the
    type. Raises MissingExtraError."""
    scores = {"map_difference": mean_figure(map_differences(found_NHW3, given_NHW3), seed)}
    scales = ssim_scales(min(given_NHW3.shape[1:3]))
    if type_name in SOFT_TYPES and scales:
        name = "ms_ssim" if scales == len(SCALES) else f"ms_ssim_{scales}_scales"
        scores[name] = mean_figure(ms_ssim(found_NHW3, given_NHW3, scales), seed)
    if type_name == "depth":
        scores["rmse"] = mean_figure(rmse(found_NHW3, given_NHW3), seed)
    if type_name == "seg":
        scores["miou"] = mean_iou(found_NHW3, given_NHW3, seed)
    return scores


def map_differences(found_NHW3: np.ndarray, given_NHW3: np.ndarray) -> np.ndarray:
    """differences_N: mean absolute difference of two maps in grey levels of 0 to 255."""
    return np.abs(found_NHW3.astype(np.float64) - given_NHW3).mean((1, 2, 3))


def rmse(found_NHW3: np.ndarray, given_NHW3: np.ndarray) -> np.ndarray:
    """rmse_N of each picture, in grey levels of 0 to 255."""
    return np.sqrt(((found_NHW3.astype(np.float64) - given_NHW3) ** 2).mean((1, 2, 3)))


def ssim_scales(side: int) -> int:
    """How many of the five scales maps of this side allow; 0 = not even one window fits. torchmetrics wants
    side / (scales - 1)^2 to be a window; and the map of the last scale is to hold one."""
    return max((n for n in range(1, len(SCALES) + 1) if side // max(2 ** (n - 1), (n - 1) ** 2) >= SSIM_WINDOW),
               default=0)


def ms_ssim(found_NHW3: np.ndarray, given_NHW3: np.ndarray, scales: int = len(SCALES)) -> np.ndarray:
    """ms_ssim_N of maps scaled to [0, 1]. With fewer scales the weights of the first are stretched to the same sum."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = tuple(weight * sum(SCALES) / sum(SCALES[:scales]) for weight in SCALES[:scales])
    values = [multiscale_structural_similarity_index_measure(unit_range(found_HW3[None]), unit_range(given_HW3[None]),
                                                             data_range=1.0, betas=weights)
              for found_HW3, given_HW3 in zip(found_NHW3, given_NHW3)]
    return np.array([float(value) for value in values])


def unit_range(pixels_NHW3: np.ndarray) -> Tensor:
    """pixels_N3HW float32 in [0, 1] of uint8 pictures."""
    return torch.from_numpy(np.ascontiguousarray(pixels_NHW3)).movedim(-1, 1).float() / 255


def mean_iou(found_NHW3: np.ndarray, given_NHW3: np.ndarray, seed: int = 0) -> Figure:
    """Per class, the pixels where both maps show it over those where one does, summed over all pictures; then the mean
    over the classes that occur. A class is a colour; pixels that are black (no label) in the given map do not count."""
    found_NHW, given_NHW = (maps.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]) for maps in (found_NHW3, given_NHW3))
    labelled = [(found[given > 0], given[given > 0]) for found, given in zip(found_NHW, given_NHW) if given.any()]
    if not labelled:
        return Figure(np.nan, np.nan, np.nan)
    colours_V = np.setdiff1d(np.unique(np.concatenate([np.concatenate(pair) for pair in labelled])), [0])
    counted = [_per_class(found_P, given_P, colours_V) for found_P, given_P in labelled]
    both_NV, either_NV = (np.stack(counts).astype(np.float64) for counts in zip(*counted))

    def mean(weights_N: np.ndarray) -> float:
        either_V = weights_N @ either_NV
        return float(((weights_N @ both_NV)[either_V > 0] / either_V[either_V > 0]).mean())

    count = len(labelled)
    return figure(mean(np.ones(count)), map(mean, draws(count, seed=seed)), lowest=0.0)


def _per_class(found_P: np.ndarray, given_P: np.ndarray, colours_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(intersection_V, union_V) in pixels."""
    found_V, given_V, both_V = (_count(values, colours_V) for values in (found_P, given_P, given_P[found_P == given_P]))
    return both_V, found_V + given_V - both_V


def _count(values_P: np.ndarray, colours_V: np.ndarray) -> np.ndarray:
    places = np.searchsorted(colours_V, values_P).clip(max=len(colours_V) - 1)
    return np.bincount(places[colours_V[places] == values_P], minlength=len(colours_V))
