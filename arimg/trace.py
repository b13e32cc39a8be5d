"""The trace of a decode: over each picture, the pass at which each of its tokens was fixed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from arimg.images import make_grid

_SIDE = 512             # pixels of the longer side, at least
_OPACITY = 0.6
_LEGEND = 28            # pixels


def draw_trace(pictures: Sequence[Image.Image], fixed_at_BL: Sequence[Sequence[int]],
               grid: tuple[int, int]) -> Image.Image:
    """A grid of the pictures under their passes, from dark (the first) to bright (the last pass of the decode)."""
    last = max(max(row) for row in fixed_at_BL)
    traced = [_overlay(picture, np.array(row).reshape(grid), last) for picture, row in zip(pictures, fixed_at_BL)]
    sheet = make_grid(traced)
    canvas = Image.new("RGB", (sheet.width, sheet.height + _LEGEND), "white")
    canvas.paste(sheet, (0, 0))
    ramp = Image.fromarray(_colours(np.arange(1, last + 1)[None], last))
    canvas.paste(ramp.resize((sheet.width, 10), Image.Resampling.NEAREST), (0, sheet.height + 2))
    pen = ImageDraw.Draw(canvas)
    pen.text((2, sheet.height + 14), "pass 1", fill="black")
    label = f"pass {last}"
    pen.text((sheet.width - 2 - pen.textlength(label), sheet.height + 14), label, fill="black")
    return canvas


def _colours(passes_hw: np.ndarray, last: int) -> np.ndarray:
    """uint8 (h, w, 3): viridis from pass 1 to the last."""
    import cv2

    level = np.round((passes_hw - 1) * (255 / max(1, last - 1))).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(level, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _overlay(picture: Image.Image, passes_hw: np.ndarray, last: int) -> Image.Image:
    """The picture, enlarged, under its passes."""
    scale = max(1, -(-_SIDE // max(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    below = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    above = Image.fromarray(_colours(passes_hw, last)).resize(size, Image.Resampling.NEAREST)
    return Image.blend(below, above, _OPACITY)
