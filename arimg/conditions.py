"""What a picture is made from: classes or captions as a Condition, control images as maps of the model's size."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arimg import images
from arimg.call import CallOptions, as_list
from arimg.control.base import ControlType, build, get_type
from arimg.errors import InputError, UnknownNameError
from arimg.models.base import Condition
from arimg.models.text import TextEncoder
from arimg.registry import CONTROLS

log = logging.getLogger("arimg")


@dataclass(frozen=True)
class ControlMap:
    """One control of a call, ready for the control component."""

    type: ControlType
    maps_R3HW: Tensor           # in [-1, 1]; one row for all pictures, or one for each
    scale: float
    start: float
    end: float


# ---------------------------------------------------------------------------------------------------------------------
# Classes and captions


def condition_of(options: CallOptions, transformer: Any, class_names: Sequence[str],
                 text: TextEncoder | None) -> Condition:
    """The Condition of a call, one row per class or prompt; the null condition where nothing is said.

    Raises InputError when the model takes the other kind of condition, UnknownNameError on an unknown class.
    """
    by_class = options.class_name is not None or options.class_id is not None
    by_text = options.prompt is not None or options.prompt_embeds is not None
    device = next(transformer.parameters()).device
    if transformer.config.conditioning == "class":
        if by_text:
            raise InputError("a prompt is given, but this model knows classes, not captions; give a class instead")
        if not by_class:
            return transformer.null(Condition(class_ids_B=torch.zeros(1, dtype=torch.int64, device=device)))
        given = options.class_name if options.class_name is not None else options.class_id
        ids = [class_id(value, class_names, transformer.config.num_classes) for value in _values(given)]
        return Condition(class_ids_B=torch.tensor(ids, device=device))
    if by_class:
        raise InputError("a class is given, but this model knows captions, not classes; give a prompt instead")
    return _caption_condition(options, transformer, text, device)


def _values(given: Any) -> list[Any]:
    values = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else given
    values = as_list(values)
    if not values:
        raise InputError("the list of classes or prompts is empty; give at least one, or none at all")
    return values


def class_id(value: str | int, class_names: Sequence[str], count: int) -> int:
    """The id behind a class name (case and all but one of its comma-separated synonyms may differ) or an id.

    Raises UnknownNameError on an unknown name, InputError on an id out of range.
    """
    text = str(value).strip()
    if re.fullmatch(r"-?\d{1,18}", text):
        if not 0 <= int(text) < count:
            raise InputError(f"class {text}: the ids of this model are 0 to {count - 1}")
        return int(text)
    ids: dict[str, int] = {}
    for index, name in enumerate(class_names):
        for synonym in (name, *name.split(",")):
            ids.setdefault(synonym.strip().lower(), index)
    if text.lower() not in ids:
        if not class_names:
            raise InputError(f"class {text!r}: this model has no class names; give an id from 0 to {count - 1}")
        raise UnknownNameError("class", text, class_names)
    return ids[text.lower()]


def _caption_condition(options: CallOptions, transformer: Any, text: TextEncoder | None,
                       device: torch.device) -> Condition:
    config = transformer.config
    if options.prompt is not None:
        if text is None:
            raise InputError("prompt is given, but this pipeline has no text encoder; add the folders text_encoder and "
                             "text_tokenizer, or give prompt_embeds")
        return text(_values(options.prompt), config.caption_length)
    slots, channels = config.caption_length, config.caption_dim
    if options.prompt_embeds is None:
        return transformer.null(Condition(caption_BPC=torch.zeros(1, slots, channels, device=device)))
    caption, mask = options.prompt_embeds.to(device), options.prompt_attention_mask
    if caption.ndim not in (2, 3) or caption.shape[-2:] != (slots, channels):
        raise InputError(f"prompt_embeds of shape {tuple(caption.shape)}: this model reads ({slots}, {channels}) or "
                         f"(B, {slots}, {channels})")
    caption_BPC = caption.reshape(-1, slots, channels)
    if mask is None:
        return Condition(caption_BPC=caption_BPC)
    if mask.shape != caption.shape[:-1]:
        raise InputError(f"prompt_attention_mask of shape {tuple(mask.shape)} does not fit prompt_embeds of shape "
                         f"{tuple(caption.shape)}; it needs one value per slot")
    mask_BP = mask.to(device).bool().reshape(-1, slots)
    return Condition(caption_BPC=caption_BPC * mask_BP[..., None], caption_mask_BP=mask_BP)


def repeat_condition(condition: Condition, each: int, rows: int) -> Condition:
    """Every row `each` times in a row; a single row as often as there are pictures."""
    def repeat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else repeat_rows(tensor, each, rows)
    return Condition(repeat(condition.class_ids_B), repeat(condition.caption_BPC), repeat(condition.caption_mask_BP))


def repeat_rows(tensor: Tensor, each: int, rows: int, dim: int = 0) -> Tensor:
    """`rows` rows along `dim` out of 1, of rows / each, or of all of them. Raises InputError on any other number."""
    found = tensor.shape[dim]
    if found == rows:
        return tensor
    if found == 1:
        return tensor.expand(*tensor.shape[:dim], rows, *tensor.shape[dim + 1:])
    if found * each == rows:
        return tensor.repeat_interleave(each, dim)
    raise InputError(f"{found} classes, prompts or maps for {rows} pictures; give 1, or one for each")


# ---------------------------------------------------------------------------------------------------------------------
# Controls


def control_maps(options: CallOptions, trained: Sequence[str], size: tuple[int, int]) -> list[ControlMap]:
    """The controls of a call at `size`: those given as maps, then those extracted from photos, paired in this order
    with types, scales, starts and ends.

    Raises UnknownNameError on an unknown type; InputError on a type that is not in `trained` (if any are named there),
    counts that do not pair up, and images that cannot be read.
    """
    sources = [(source, False) for source in as_list(options.control)]
    sources += [(source, True) for source in as_list(options.control_from)]
    if not sources:
        _check_no_details(options)
        return []
    names = [checked_type(name, trained) for name in as_list(options.control_type) or [None]]
    types = _paired("control_type", [get_type(name) for name in names], len(sources))
    scales, starts, ends = (_paired(name, as_list(getattr(options, name)), len(sources))
                            for name in ("control_scale", "control_start", "control_end"))
    return [ControlMap(kind, control_tensor(source, kind, size, options.resize, extract), scale, start, end)
            for (source, extract), kind, scale, start, end in zip(sources, types, scales, starts, ends)]


def _check_no_details(options: CallOptions) -> None:
    """Raises InputError when details of a control are given, but no control."""
    for name in ("control_type", "control_scale", "control_start", "control_end"):
        value = getattr(options, name)
        if value != getattr(CallOptions, name):
            given = ", ".join(map(str, as_list(value)))
            raise InputError(f"{name} {given} is given without a control image; give one")


def checked_type(name: str | None, trained: Sequence[str]) -> str:
    """`name`, or the first type in `trained`, with a notice when there are others. Raises UnknownNameError, and
    InputError on a type the model never saw."""
    if name is None:
        if not trained:
            raise InputError("control_type is missing, and this model does not name the types it was trained on: say "
                             "what the image shows, for example canny")
        if len(trained) > 1:
            log.warning("control type not given: the image is read as %s (of %s)", trained[0], ", ".join(trained))
        return trained[0]
    CONTROLS.check(name)
    if trained and name not in trained:
        raise InputError(f"control type {name!r}: this model was trained on {', '.join(trained)}; use one of these")
    return name


def _paired(name: str, values: list[Any], count: int) -> list[Any]:
    if len(values) not in (1, count):
        raise InputError(f"{len(values)} values of {name} for {count} control images; give one for all or one for each")
    return values if len(values) == count else values * count


def control_tensor(source: Any, kind: ControlType, size: tuple[int, int], resize: str, extract: bool) -> Tensor:
    """maps_R3HW in [-1, 1] of one control: loaded, extracted if it is a photo, fitted to `size` with a notice.

    Raises InputError on sources that cannot be read and on tensors of another size.
    """
    if isinstance(source, Tensor):
        return _checked_tensor(source, size)
    image = _load(source, "photo" if extract else "control image")
    if image.size != size[::-1]:
        log.warning("%s %dx%d fitted to %dx%d (resize %s)", "photo" if extract else "control image", image.height,
                    image.width, *size, resize)
    if extract:
        image = build(kind.name)(_fit_photo(image, size, resize))
    return images.to_tensor(kind.fit(image, size, resize))[None]


def _fit_photo(photo: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """The photo at the scale it will be painted at, without the border of mode "pad", whose edge would be extracted."""
    if resize != "pad":
        return images.fit(photo, size, resize)
    scale = min(size[0] / photo.height, size[1] / photo.width)
    return images.fit(photo, (max(1, round(photo.height * scale)), max(1, round(photo.width * scale))), "stretch")


def _load(source: Any, what: str) -> Image.Image:
    if not isinstance(source, np.ndarray):
        return images.load_image(source, what)
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3):
        raise InputError(f"{what} is an array of {source.dtype} and shape {source.shape}; give uint8 of shape (H, W) "
                         "or (H, W, 3)")
    return images.load_image(Image.fromarray(source), what)


def _checked_tensor(source: Tensor, size: tuple[int, int]) -> Tensor:
    maps_R3HW = source[None] if source.ndim == 3 else source
    if maps_R3HW.ndim != 4 or maps_R3HW.shape[1:] != (3, *size) or not maps_R3HW.is_floating_point():
        raise InputError(f"control tensor of {source.dtype} and shape {tuple(source.shape)}: give floating-point "
                         f"values in [-1, 1] of shape (3, {size[0]}, {size[1]}) or (B, 3, {size[0]}, {size[1]})")
    return maps_R3HW
