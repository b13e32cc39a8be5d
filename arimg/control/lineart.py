"""Line art: strokes of the learned generator, or of a difference of Gaussians (control/lines.py), without weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import MAX_SIDE, ControlType, Status, annotator_path, at_most, check_choice, check_number
from arimg.control.lines import strokes
from arimg.errors import CheckpointError, InputError
from arimg.images import RESAMPLES, to_tensor

log = logging.getLogger("arimg")

METHODS = ("auto", "network", "classical")
FILE = "sk_model.pth"
GET_WEIGHTS = f"put {FILE} of lllyasviel/Annotators there, or give weights={FILE}"
MIN_SIDE = 8         # what the generator's reflection padding needs


class Lineart:
    """Strokes, 0 to 255.

    method: "network" draws with the learned generator, "classical" takes the strokes of `control.lines.strokes`, "auto"
    the generator if its weights are installed, else the classical ones, and says so.
    weights: the generator's sk_model.pth (or safetensors). Default: $ARIMG_HOME/annotators/sk_model.pth. The generator
    draws dark on white, and its map is inverted: every lineart map is white on black (ControlAR did so in one of its
    scripts only).
    sigma, threshold: of the classical strokes; the generator does not use them.
    """

    type: ClassVar = ControlType("lineart", "strokes (learned, or difference of Gaussians)", "white strokes on black")

    def __init__(self, weights: Any = None, method: Any = "auto", sigma: Any = 1.0, threshold: Any = 2.0) -> None:
        self.sigma = check_number("lineart sigma", sigma, 0.1, 100)
        self.threshold = check_number("lineart threshold", threshold, 0, 254)
        path = _generator_path(weights, check_choice("lineart method", method, METHODS))
        self.network: Any = _load_generator(path) if path else None

    def __call__(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        strokes_HW = self._trace(image) if self.network is None else self._draw(image)
        drawing = Image.fromarray(strokes_HW).resize(image.size, RESAMPLES[self.type.resample])
        return drawing.convert("RGB")

    def _trace(self, image: Image.Image) -> np.ndarray:
        return strokes(np.array(image), self.sigma, self.threshold).astype(np.uint8)

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
        path = annotator_path(FILE)
        if path.is_file():
            return Status(True, f"learned generator, weights {path}; method=classical draws without it")
        return Status(True, f"classical strokes; no weights at {path} for the learned generator: {GET_WEIGHTS}")


def _generator_path(weights: Any, method: str) -> Path | None:
    """The generator's file, or None for classical strokes. Raises InputError and CheckpointError."""
    path = Path(weights).expanduser() if weights else annotator_path(FILE)
    if method == "classical":
        if weights:
            raise InputError(f"lineart weights={weights} with method=classical, which has none; leave one of them out")
        return None
    if weights or path.is_file():
        return path
    if method == "network":
        raise CheckpointError(f"lineart method=network needs weights, and {str(path)!r} does not exist; {GET_WEIGHTS}")
    log.warning("lineart: no weights at %s, so strokes are classical; for the learned generator, %s", path, GET_WEIGHTS)
    return None


def _load_generator(path: Path) -> Any:
    from arimg.control.lineart_network import LineGenerator
    from arimg.weights import load_strict, read_weights

    return load_strict(LineGenerator(), read_weights(path), path)
