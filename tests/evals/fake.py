"""Feature extractors that cost nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from arimg.evals.extractors import Features

CELLS = 4


class FakeExtractor:
    """Means of the channels, and how much they vary."""

    name = "fake"

    def __init__(self, device: Any = "cpu") -> None:
        pass

    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        scaled = pixels_BHW3.astype(np.float32) / 255
        return Features(np.concatenate([scaled.mean((1, 2)), scaled.std((1, 2))], axis=1))

    def describe(self) -> dict[str, str]:
        return {"name": self.name}


class FakeInception(FakeExtractor):
    """As Inception has them: features, a spatial layer and logits, from means over 4 x 4 cells of the picture."""

    name = "toy"

    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        batch, height, width, _ = pixels_BHW3.shape
        cells = pixels_BHW3.reshape(batch, CELLS, height // CELLS, CELLS, width // CELLS, 3).mean((2, 4)) / 255
        flat = cells.reshape(batch, -1).astype(np.float32)
        mix = np.random.default_rng(0).normal(size=(flat.shape[1], 20)).astype(np.float32)
        return Features(np.tanh(flat @ mix[:, :10]), flat[:, :12], 3 * flat @ mix)
