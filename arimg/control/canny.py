"""Canny edges (Canny 1986) as ControlAR uses them: OpenCV on the three-channel picture."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import ControlType, Status, check_number
from arimg.errors import InputError

MAX_GRADIENT = 2040      # the largest |dx| + |dy| of 3x3 Sobel filters on 8 bits: 2 * 4 * 255


class Canny:
    """One-pixel edges, 0 or 255.

    low, high: hysteresis thresholds on the L1 norm of the 3x3 Sobel gradient (the strongest channel counts); edges
    above `high` are kept, and edges above `low` that touch them. ControlAR trains and evaluates with 100 and 200.
    """

    type: ClassVar = ControlType("canny", "one-pixel edges (OpenCV)", "white edges on black", resample="nearest")

    def __init__(self, low: Any = 100, high: Any = 200) -> None:
        self.low = check_number("canny low", low, 0, MAX_GRADIENT)
        self.high = check_number("canny high", high, 0, MAX_GRADIENT)
        if self.low > self.high:
            raise InputError(f"canny low is {self.low:g}, above canny high {self.high:g}; give low <= high")

    def __call__(self, image: Image.Image) -> Image.Image:
        import cv2

        edges_HW = cv2.Canny(np.array(image.convert("RGB")), self.low, self.high)
        return Image.fromarray(edges_HW).convert("RGB")

    @classmethod
    def status(cls) -> Status:
        return Status(True, "OpenCV, thresholds low=100 high=200")
