"""Random training maps: what a control type's maps may look like, whoever made them.

A user's map comes from other thresholds, another picture or a hand, so a model that saw one setting of one extractor
only would obey that alone. Here every picture's map is drawn: thresholds, stroke widths, missing pieces, colours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from arimg.control.color import flat_colors
from arimg.control.lines import strokes
from arimg.control.softedge import soft_edges
from arimg.errors import UnknownNameError
from arimg.registry import CONTROLS

BLANKED = 0.1           # share of line maps that are empty in one half, so that a map of a part is obeyed, too


def check_types(types: tuple[str, ...]) -> None:
    """Raises UnknownNameError with the nearest names for a type that does not exist or has no training maps."""
    for name in types:
        CONTROLS.check(name)
        if name not in _MAPS:
            raise UnknownNameError("control type with training maps", name, _MAPS)


def random_map(name: str, pixels_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A map uint8 (H, W, 3) of the control type `name` for a uint8 picture (H, W, 3); all chance comes from `rng`."""
    map_HW3 = _MAPS[name](np.ascontiguousarray(pixels_HW3), rng)
    return map_HW3 if map_HW3.ndim == 3 else np.repeat(map_HW3.astype(np.uint8)[..., None], 3, axis=2)


def random_canny(pixels_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """edges_HW, 0 or 255: thresholds, a blur before, small pieces left out, strokes of 1 to 3 pixels."""
    import cv2

    low = rng.uniform(40, 160)
    high = low * rng.uniform(1.5, 3)
    if rng.random() < 0.25:
        pixels_HW3 = cv2.GaussianBlur(pixels_HW3, (0, 0), rng.uniform(0.4, 1.0))
    edges_HW = cv2.Canny(pixels_HW3, low, high)
    if rng.random() < 0.25:
        edges_HW = _without_pieces(edges_HW, int(rng.integers(4, 17)))
    return _half_blank(_widened(edges_HW, rng, 0.35), rng)


def random_softedge(pixels_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """edges_HW, 0 to 255: scale and gain; some with weak edges cut off."""
    edges_HW = soft_edges(pixels_HW3, rng.uniform(0.6, 2.0), np.exp(rng.uniform(np.log(0.6), np.log(3.0))))
    if rng.random() < 0.3:
        edges_HW = (edges_HW - rng.uniform(10, 60)).clip(0) * rng.uniform(1, 1.3)
    return _half_blank(edges_HW.clip(0, 255), rng)


def random_lineart(pixels_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """strokes_HW, 0 to 255: scale, threshold, width; half of them in one brightness, as a pen draws."""
    strokes_HW = strokes(pixels_HW3, rng.uniform(0.6, 1.6), np.exp(rng.uniform(np.log(1.0), np.log(6.0))))
    if rng.random() < 0.5:
        strokes_HW = np.where(strokes_HW > rng.uniform(60, 160), rng.uniform(160, 255), 0)
    return _half_blank(_widened(strokes_HW.astype(np.uint8), rng, 0.3), rng)


def random_color(pixels_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """regions_HW3: number of colours, coarseness; colours a little off, white stays white."""
    flat_HW3 = flat_colors(pixels_HW3, int(rng.integers(3, 13)), int(rng.choice([3, 3, 5, 7])))
    if rng.random() < 0.5:
        return flat_HW3
    colors_K3, labels_HW = _palette(flat_HW3)
    shift_K3 = rng.normal(0, 8, (len(colors_K3), 3)) * (colors_K3.min(axis=1) < 250)[:, None]
    return (colors_K3 + shift_K3).round().clip(0, 255).astype(np.uint8)[labels_HW]


_MAPS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "canny": random_canny, "softedge": random_softedge, "lineart": random_lineart, "color": random_color}


def _without_pieces(edges_HW: np.ndarray, smallest: int) -> np.ndarray:
    """Edges less connected pieces of fewer than `smallest` pixels."""
    import cv2

    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(edges_HW, connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= smallest
    kept[0] = False                             # the ground
    return np.where(kept[labels_HW], edges_HW, 0)


def _widened(lines_HW: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Lines made 1 or 2 pixels wider in this share of the cases."""
    import cv2

    if rng.random() >= share:
        return lines_HW
    side = int(rng.integers(2, 4))
    return cv2.dilate(lines_HW, np.ones((side, side), np.uint8))


def _half_blank(lines_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """In a share `BLANKED` of the cases the left, right, upper or lower half is black."""
    if rng.random() >= BLANKED:
        return lines_HW
    lines_HW, turns = lines_HW.copy(), int(rng.integers(4))
    rotated_HW = np.rot90(lines_HW, turns)      # a view: its upper half is any half of the picture
    rotated_HW[:len(rotated_HW) // 2] = 0
    return lines_HW


def _palette(flat_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(colors_K3, labels_HW) of a picture of few colours."""
    packed_HW = flat_HW3.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    colors, labels = np.unique(packed_HW, return_inverse=True)
    return np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1), labels.reshape(packed_HW.shape)
