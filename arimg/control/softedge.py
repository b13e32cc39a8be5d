"""Soft edges without a network: the colour gradient at one scale."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import ControlType, Status, check_number

QUANTILE = 0.97     # of the gradient's magnitudes: becomes white
LOWEST = 8.0        # grey levels per pixel: a picture without stronger edges is not amplified to white


class SoftEdges:
    """Edges as broad grey bands, 0 to 255 = strength relative to the strong edges of the picture.

    sigma: width of the Gaussian that smooths the picture first, in pixels; larger finds broader edges.
    gain: factor on the strength; above 1, weak edges become as white as strong ones.
    """

    type: ClassVar = ControlType("softedge", "soft edges (colour gradient)", "white edges on black, bright is strong")

    def __init__(self, sigma: Any = 1.0, gain: Any = 1.0) -> None:
        self.sigma = check_number("softedge sigma", sigma, 0.1, 100)
        self.gain = check_number("softedge gain", gain, 0.01, 100)

    def __call__(self, image: Image.Image) -> Image.Image:
        edges_HW = soft_edges(np.array(image.convert("RGB")), self.sigma, self.gain)
        return Image.fromarray(edges_HW.astype(np.uint8)).convert("RGB")

    @classmethod
    def status(cls) -> Status:
        return Status(True, "OpenCV, no weights; sigma=1 gain=1")


def soft_edges(pixels_HW3: np.ndarray, sigma: float = 1.0, gain: float = 1.0) -> np.ndarray:
    """edges_HW, float32 in 0..255: max over channels of |grad(G(sigma) * picture)|, its 97 % quantile as white."""
    import cv2

    smooth_HW3 = cv2.GaussianBlur(pixels_HW3.astype(np.float32), (0, 0), sigma)
    dx_HW3, dy_HW3 = (cv2.Sobel(smooth_HW3, cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1)))
    strength_HW = np.sqrt((dx_HW3 * dx_HW3 + dy_HW3 * dy_HW3).max(axis=2))
    white = max(LOWEST, float(np.quantile(strength_HW, QUANTILE)))
    return (strength_HW * (255 * gain / white)).clip(0, 255)
