"""Control types and extractors: what a control image of a type looks like, and how one is made from a photograph.

A *type* says once, for extraction, training, sampling and evaluation alike, what bright pixels mean, what fills the
border, and how its images are resized (defect 19 of ControlAR: those differed from script to script). An *extractor*
is a class with a `type`, keyword options, a cheap `status`, and a call from a picture to a control image. Extractors
of other packages come in through the entry-point group "arimg.controls" (docs/extend.md).

Nothing here imports torch, OpenCV or transformers: listing the types is instant.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from PIL import Image

from arimg import images
from arimg.errors import InputError, UnknownNameError
from arimg.home import arimg_home
from arimg.registry import CONTROLS

MAX_SIDE = 1024      # networks see larger pictures scaled down to this; the map is scaled back


@dataclass(frozen=True)
class ControlType:
    """What the control images of one type have in common. All are 8-bit RGB.

    name: the registry name. summary: one line for lists. polarity: what bright (or coloured) pixels mean.
    resample: "nearest" where new grey levels or blended colours would be wrong, else "bicubic".
    background: the RGB colour of "nothing here", which fills the border when an image is padded.
    """

    name: str
    summary: str
    polarity: str
    resample: str = "bicubic"
    background: tuple[int, int, int] = (0, 0, 0)

    def fit(self, image: Image.Image, size: tuple[int, int], mode: str = "pad") -> Image.Image:
        """A control image of this type at `size` = (height, width); `mode` as in `arimg.images.fit`."""
        return images.fit(image, size, mode, self.resample, self.background)


class Status(NamedTuple):
    """Whether an extractor can run now; `detail` says what it uses, or what is missing and how to get it."""

    ready: bool
    detail: str


class Extractor(Protocol):
    """From a photograph to a control image of the same size. Options are keyword arguments of the constructor."""

    type: ClassVar[ControlType]

    def __call__(self, image: Image.Image) -> Image.Image:
        """The control image (RGB) of an RGB picture."""

    @classmethod
    def status(cls) -> Status:
        """Whether the extractor with its default options is ready. Loads no network and goes to no network."""


class AsIs:
    """A control image made elsewhere, used as it is."""

    type: ClassVar = ControlType("map", "any control image, used as it is", "as the model was trained")

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    @classmethod
    def status(cls) -> Status:
        return Status(True, "nothing to extract")


def get_type(name: str) -> ControlType:
    """The type called `name`. Raises UnknownNameError with the nearest names."""
    return CONTROLS.load(name).type


def build(name: str, **options: Any) -> Extractor:
    """The extractor called `name`. Raises UnknownNameError (name or option) and InputError (value, missing weights)."""
    extractor = CONTROLS.load(name)
    known = [option for option in inspect.signature(extractor).parameters if option != "self"]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of {name}", option, known)
    return extractor(**options)


def statuses() -> list[tuple[str, ControlType, Status]]:
    """(name, type, status) of every known control type, sorted by name."""
    classes = [(name, CONTROLS.load(name)) for name in CONTROLS.names()]
    return [(name, extractor.type, extractor.status()) for name, extractor in classes]


# ---------------------------------------------------------------------------------------------------------------------
# For the extractors: options, places, sizes


def check_number(option: str, value: Any, low: float, high: float) -> float:
    """`value` (a number or its text) as a float within [low, high]. Raises InputError naming the option."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"{option} is {value!r}; it must be a number from {low:g} to {high:g}")
    return number


def check_choice(option: str, value: Any, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`. Raises UnknownNameError naming the option."""
    if value not in (known := list(choices)):
        raise UnknownNameError(option, str(value), known)
    return value


def annotator_path(file: str) -> Path:
    """Where the weights of extractors lie: $ARIMG_HOME/annotators (default ~/.cache/arimg/annotators)."""
    return arimg_home() / "annotators" / file


def at_most(image: Image.Image, side: int = MAX_SIDE) -> Image.Image:
    """`image`, scaled down if its longer side exceeds `side` pixels."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    return images.fit(image, size, "stretch")
