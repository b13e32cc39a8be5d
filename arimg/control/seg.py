"""Segmentation maps: label maps given their palette's colours, or extraction with networks of transformers."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from arimg.control.base import ControlType, Status, check_choice, check_number
from arimg.control.palettes import PALETTES
from arimg.control.pretrained import load_config, load_network, model_status
from arimg.errors import CheckpointError, InputError

DEFAULT_MODEL = "openmmlab/upernet-convnext-tiny"      # trained on ADE20K
MASK_KINDS = ("mask2former", "maskformer")      # mask classifiers; every other kind labels pixels
SOURCES = ("photo", "labels")
NO_LABEL = 255                                  # in label maps; black in the control image


class Segmentation:
    """Classes as the colours of a palette; pixels without a label are black.

    source: "photo" (a network finds the classes) or "labels" (the picture is a label map: one channel of class
    numbers from `first` on, 255 = no label; first=1 for ADE20K's own annotation files, where 0 = no label).
    palette: "ade20k" (150 classes) or "coco-stuff" (171). A colour map made elsewhere needs no extraction: use it as
    the control image as it is.
    model: a folder in the layout of transformers, or the id of a model in the local hub cache: Mask2Former, MaskFormer,
    or any semantic segmentation model (SegFormer, UperNet, BEiT, ...), with classes in the palette's order.
    """

    type: ClassVar = ControlType("seg", "segmentation map (label maps, or transformers)",
                                 "one colour per class, black where there is none", resample="nearest")

    def __init__(self, source: str = "photo", palette: str = "ade20k",
                 model: str | PathLike[str] = DEFAULT_MODEL, first: Any = 0) -> None:
        self.source = check_choice("seg source", source, SOURCES)
        self.palette = PALETTES[check_choice("seg palette", palette, PALETTES)]
        self.first = int(check_number("seg first", first, 0, 1))
        if self.source == "photo":
            self.processor, self.network = _load(fspath(model), palette)

    def __call__(self, image: Image.Image) -> Image.Image:
        labels_HW = _read_labels(image, self.first) if self.source == "labels" else self._find_labels(image)
        return colorize(labels_HW, self.palette)

    def _find_labels(self, image: Image.Image) -> np.ndarray:
        import torch

        with torch.no_grad():
            outputs = self.network(**self.processor(images=image.convert("RGB"), return_tensors="pt"))
        size = (image.height, image.width)
        labels_HW = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
        return labels_HW.cpu().numpy()

    @classmethod
    def status(cls) -> Status:
        photo = model_status(DEFAULT_MODEL)
        return Status(photo.ready, f"{photo.detail}; label maps need nothing: source=labels")


def colorize(labels_HW: np.ndarray, palette_V3: np.ndarray) -> Image.Image:
    """The colour map of class numbers; `NO_LABEL` is black. Raises InputError for numbers that are no class."""
    known_HW = (labels_HW >= 0) & (labels_HW < len(palette_V3))
    strange = np.unique(labels_HW[~known_HW & (labels_HW != NO_LABEL)])
    if strange.size:
        raise InputError(f"label map holds {', '.join(map(str, strange[:5]))}; the palette has classes 0 to "
                         f"{len(palette_V3) - 1}: choose another palette, or first=1 if classes count from 1")
    colours_HW3 = np.zeros((*labels_HW.shape, 3), np.uint8)
    colours_HW3[known_HW] = palette_V3[labels_HW[known_HW]]
    return Image.fromarray(colours_HW3)


def _read_labels(image: Image.Image, first: int) -> np.ndarray:
    """Class numbers from 0 on, `NO_LABEL` where there is none."""
    values = np.array(image).astype(np.int64)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise InputError("label map has colours, but must have one channel of class numbers; a colour map needs no "
                             "extraction: use it as the control image as it is")
        values = values[..., 0]
    return np.where((values == NO_LABEL) | (values < first), NO_LABEL, values - first)


def _load(model: str, palette: str) -> tuple[Any, Any]:
    config = load_config(model, "segmentation")
    import transformers

    if config.model_type in MASK_KINDS:
        auto_class: Any = transformers.AutoModelForUniversalSegmentation
    elif type(config) in transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        auto_class = transformers.AutoModelForSemanticSegmentation
    else:
        raise CheckpointError(f"model {model!r} is of kind {config.model_type!r}, which does no semantic segmentation; "
                              "give a Mask2Former, SegFormer or UperNet model")
    if config.num_labels > len(PALETTES[palette]):
        raise CheckpointError(f"model {model!r} has {config.num_labels} classes, palette {palette} has "
                              f"{len(PALETTES[palette])} colours; choose another palette or model")
    return load_network(auto_class, model)
