"""Line art: strokes from a difference of Gaussians (no weights), or from the learned generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import MAX_SIDE, ControlType, Status, at_most, check_number
from arimg.errors import InputError
from arimg.images import RESAMPLES, to_tensor

MIN_SIDE = 8         # what the generator's reflection padding needs
RATIO = 1.6          # of the two Gaussians: the closest to a Laplacian (Marr and Hildreth 1980)
MID_GREY = 127       # brightness of a stroke of median strength
MIN_MEDIAN = 4       # strokes are not amplified beyond 127 / 4, so that a blank or noisy picture stays dark


class Lineart:
    """Strokes, 0 to 255.

    Without weights: a pixel is part of a stroke as far as it is darker than its surroundings in some channel,
    max over channels of G(1.6 sigma) * picture - G(sigma) * picture, so edges get a stroke on their dark side; the
    median of the values above `threshold` becomes mid-grey.
    sigma: width of the inner Gaussian in pixels; larger finds broader strokes. threshold: 0..254, values up to it are
    no stroke.
    weights: the generator's sk_model.pth (or safetensors); sigma and threshold are then not used. The generator
    draws dark on white, and its map is inverted: every lineart map is white on black (ControlAR did so in one of its
    scripts only).
    """

    type: ClassVar = ControlType("lineart", "strokes (difference of Gaussians, or learned)", "white strokes on black")

    def __init__(self, weights: Any = None, sigma: Any = 1.0, threshold: Any = 2.0) -> None:
        self.sigma = check_number("lineart sigma", sigma, 0.1, 100)
        self.threshold = check_number("lineart threshold", threshold, 0, 254)
        self.network: Any = _load_generator(Path(weights).expanduser()) if weights else None

    def __call__(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        strokes_HW = self._subtract(image) if self.network is None else self._draw(image)
        strokes = Image.fromarray(strokes_HW).resize(image.size, RESAMPLES[self.type.resample])
        return strokes.convert("RGB")

    def _subtract(self, image: Image.Image) -> np.ndarray:
        import cv2

        pixels_HW3 = np.array(image, dtype=np.float32)
        inner_HW3 = cv2.GaussianBlur(pixels_HW3, (0, 0), self.sigma)
        outer_HW3 = cv2.GaussianBlur(pixels_HW3, (0, 0), RATIO * self.sigma)
        darker_HW = (outer_HW3 - inner_HW3).max(axis=2)
        stroke_HW = darker_HW > self.threshold
        median = max(MIN_MEDIAN, float(np.median(darker_HW[stroke_HW]))) if stroke_HW.any() else MIN_MEDIAN
        return np.where(stroke_HW, darker_HW * (MID_GREY / median), 0).clip(0, 255).astype(np.uint8)

    def _draw(self, image: Image.Image) -> np.ndarray:
        import torch

        small = at_most(image)
        if min(small.size) < MIN_SIDE:
            raise InputError(f"picture of {image.width}x{image.height} pixels is too narrow; learned line art needs "
                             f"{MIN_SIDE} pixels a side (at most {MAX_SIDE} long): crop it")
        pixels_3HW = (to_tensor(small) + 1) / 2
        with torch.no_grad():
            drawing_HW = self.network(pixels_3HW[None])[0, 0]
        return ((1 - drawing_HW) * 255).round().byte().numpy()

    @classmethod
    def status(cls) -> Status:
        return Status(True, "difference of Gaussians, no weights; weights=sk_model.pth (lllyasviel/Annotators) for the "
                            "learned generator")


def _load_generator(path: Path) -> Any:
    from arimg.control.lineart_network import LineGenerator
    from arimg.weights import load_strict, read_weights

    return load_strict(LineGenerator(), read_weights(path), path)
