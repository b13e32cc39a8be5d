"""Thin strokes without a network: the extended difference of Gaussians (Winnemöller, Kyprianidis and Olsen, "XDoG",
Computers & Graphics 36(6), 2012), thinned to the ridges of the response."""

from __future__ import annotations

import numpy as np

RATIO = 1.6             # of the two Gaussians: the closest to a Laplacian (Marr and Hildreth 1980)
SHARPNESS = 0.2         # phi of XDoG, per grey level: 5 levels above the threshold give 76 % of full white
RIDGE = (0.3, 0.7)      # shares of the local maximum between which a stroke fades in


def strokes(pixels_HW3: np.ndarray, sigma: float = 1.0, threshold: float = 2.0) -> np.ndarray:
    """strokes_HW, float32 in 0..255, white on black, of an 8-bit RGB picture.

    A pixel is part of a stroke as far as it is darker than its surroundings in some channel (XDoG eq. 7, inverted):
    tanh(phi * (D - threshold)) with D = max over channels of G(1.6 sigma) * picture - G(sigma) * picture. So an edge
    gets its stroke on its dark side. Only the ridge of D is kept, which makes strokes equally thin at any contrast.
    sigma: width of the inner Gaussian in pixels. threshold: grey levels; smaller differences are no stroke.
    """
    import cv2

    pixels_HW3 = pixels_HW3.astype(np.float32)
    inner_HW3 = cv2.GaussianBlur(pixels_HW3, (0, 0), sigma)
    outer_HW3 = cv2.GaussianBlur(pixels_HW3, (0, 0), RATIO * sigma)
    darker_HW = (outer_HW3 - inner_HW3).max(axis=2)
    side = 2 * max(1, round(2 * sigma)) + 1
    highest_HW = np.maximum(cv2.dilate(darker_HW, np.ones((side, side), np.uint8)), 1e-3)
    ridge_HW = ((darker_HW / highest_HW - RIDGE[0]) / (RIDGE[1] - RIDGE[0])).clip(0, 1)
    return 255 * ridge_HW * np.tanh(SHARPNESS * (darker_HW - threshold).clip(0))
