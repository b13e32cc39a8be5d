"""Depth maps with networks of the transformers library."""

from __future__ import annotations

from os import PathLike, fspath
from typing import ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import ControlType, Status
from arimg.control.pretrained import load_config, load_network, model_status
from arimg.errors import CheckpointError

DEFAULT_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"      # Apache-2.0; the larger ones are non-commercial
KINDS = ("depth_anything", "dpt")


class Depth:
    """Inverse depth of the whole picture, min-max scaled to 0 (farthest) ... 255 (nearest).

    model: a folder in the layout of transformers, or the id of a model in the local hub cache: Depth-Anything, or DPT
    (ControlAR: Intel/dpt-large, Intel/dpt-hybrid-midas). Depth-Anything models that predict metres instead of inverse
    depth are inverted, so near is bright for all.
    """

    type: ClassVar = ControlType("depth", "depth map (transformers)", "near is bright")

    def __init__(self, model: str | PathLike[str] = DEFAULT_MODEL) -> None:
        model = fspath(model)
        config = load_config(model, "depth extraction")
        if config.model_type not in KINDS:
            raise CheckpointError(f"model {model!r} is of kind {config.model_type!r}, which is not used for depth; "
                                  f"give one of kind {', '.join(KINDS)}")
        from transformers import AutoModelForDepthEstimation

        self.metric = getattr(config, "depth_estimation_type", "relative") == "metric"
        self.processor, self.network = load_network(AutoModelForDepthEstimation, model)

    def __call__(self, image: Image.Image) -> Image.Image:
        import torch

        image = image.convert("RGB")
        with torch.no_grad():
            outputs = self.network(**self.processor(images=image, return_tensors="pt"))
        size = (image.height, image.width)
        depth_HW = self.processor.post_process_depth_estimation(outputs, target_sizes=[size])[0]["predicted_depth"]
        return to_map(depth_HW.float().cpu().numpy(), self.metric)

    @classmethod
    def status(cls) -> Status:
        return model_status(DEFAULT_MODEL)


def to_map(depth_HW: np.ndarray, metric: bool) -> Image.Image:
    """The control image of inverse depths, or of metres if `metric`; a flat scene is black."""
    near_HW = 1 / np.maximum(depth_HW, 1e-3) if metric else depth_HW
    low, high = near_HW.min(), near_HW.max()
    scaled_HW = (near_HW - low) / (high - low) if high > low else np.zeros_like(near_HW)
    return Image.fromarray((scaled_HW * 255).round().astype(np.uint8)).convert("RGB")
