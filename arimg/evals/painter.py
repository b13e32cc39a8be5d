"""A pipeline that paints for a measurement: in batches, along control images or without, with one seed per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from arimg.data import to_images
from arimg.evals.held_out import bar
from arimg.pipeline import Pipeline


class Painted(NamedTuple):
    """What was painted and what it cost."""

    pixels_NHW3: np.ndarray     # uint8
    forward_passes: float       # mean over the batches
    seconds: float              # of all batches, pixels included


@dataclass(frozen=True)
class Painter:
    """A pipeline with the options of all its calls; batches do not change the pictures."""

    pipe: Pipeline
    options: Mapping[str, Any]
    seed: int = 0
    batch: int = 20

    def __call__(self, title: str, controls: Sequence[tuple[str, np.ndarray]], class_names: Sequence[str] | None,
                 **options: Any) -> np.ndarray:
        """pixels_NHW3 uint8 along `controls`, pairs of a type and its maps_NHW3; picture k has seed + k."""
        return self.paint(title, len(controls[0][1]), controls, class_names, **options).pixels_NHW3

    def paint(self, title: str, count: int, controls: Sequence[tuple[str, np.ndarray]],
              class_names: Sequence[str] | None, **options: Any) -> Painted:
        """`count` pictures along `controls`, which may be none."""
        pixels, passes, seconds = [], [], 0.0
        for start in bar(title)(range(0, count, self.batch)):
            stop = min(start + self.batch, count)
            given = {**self.options, **options, "seeds": [self.seed + k for k in range(start, stop)]}
            if controls:
                given["control"] = [to_images(maps_NHW3[start:stop]) for _, maps_NHW3 in controls]
                given["control_type"] = [name for name, _ in controls]
            if class_names is not None:
                given["class_name"] = list(class_names[start:stop])
            out = self.pipe(**given)
            pixels += [np.asarray(picture) for picture in out.images]
            passes.append(out.stats.forward_passes)
            seconds += sum(out.stats.seconds.values())
        return Painted(np.stack(pixels), float(np.mean(passes)), seconds)
