"""The only door between picture files, PIL pictures and tensors in [-1, 1]: load, fit, convert, lay out, save.

Pictures are `PIL.Image` in mode RGB, 8 bits; sizes of tensors and of targets are (height, width).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from arimg.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

Source = str | os.PathLike[str] | bytes | Image.Image

RESIZE_MODES = ("pad", "crop", "stretch")
RESAMPLES = {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
FORMATS = ("png", "webp", "jpeg")
MAX_PIXELS = 64_000_000
WHITE = (255, 255, 255)

_SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_ENCODING: dict[str, dict[str, Any]] = {
    "png": {}, "webp": {"quality": 95}, "jpeg": {"quality": 95, "subsampling": 0},
}
_READABLE = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")      # no format that starts other programs
_METADATA_KEY = "arimg"
_EXIF_DESCRIPTION = 0x010E                     # where WebP and JPEG, which have no text chunks, carry the metadata
# What PIL's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
           zlib.error)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_image(source: Source, what: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as 8-bit RGB: turned upright by its EXIF tag, alpha laid over white, 16-bit scaled, palette, grey and
    CMYK converted; of an animation the first frame.

    `source` is a path, the bytes of a file, or a PIL picture; `what` names it in error messages.
    Raises InputError: missing, unreadable, empty, damaged or not a picture, or more than `max_pixels` pixels.
    """
    return _decode(source, what, max_pixels)[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_image` wrote into a picture.

    Raises InputError if the file cannot be read as a picture or carries no (valid) metadata.
    """
    text = _decode(path, "picture", MAX_PIXELS)[1]
    if text is None:
        raise InputError(f"picture {str(path)!r} carries no arimg metadata; give a picture that arimg wrote and no "
                         "other program saved again")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise InputError(f"the arimg metadata of picture {str(path)!r} is damaged; use the file as arimg wrote it")
    return metadata


def _decode(source: Source, what: str, max_pixels: int) -> tuple[Image.Image, str | None]:
    """The RGB picture and its metadata text. PIL's warnings are kept quiet: `max_pixels` decides about size, and a
    damaged side note (EXIF) does not matter while the pixels decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode_source(source, what, max_pixels)


def _decode_source(source: Source, what: str, max_pixels: int) -> tuple[Image.Image, str | None]:
    if isinstance(source, Image.Image):
        return _decode_picture(source, what, max_pixels)
    if isinstance(source, bytes):
        if not source:
            raise InputError(f"{what} is empty (0 bytes); give the bytes of a picture file")
        return _decode_stream(io.BytesIO(source), what, max_pixels)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"{what} is a {type(source).__name__}; give a path, the bytes of a file, or a PIL picture")
    path = Path(source)
    name = f"{what} {str(path)!r}"
    try:
        if path.is_dir():
            raise InputError(f"{name} is a folder; give the path of one picture file")
        if path.exists() and not path.is_file():
            raise InputError(f"{name} is not a regular file; give the path of a picture file")
        with path.open("rb") as stream:
            if not stream.read(1):
                raise InputError(f"{name} is empty (0 bytes); give a PNG, JPEG or WebP file")
            stream.seek(0)
            return _decode_stream(stream, name, max_pixels)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; check the path (now in {os.getcwd()!r})") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:               # no permission, name too long, null byte in the name, ...
        raise InputError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}; check the path and its "
                         "permissions") from None


def _decode_stream(stream: BinaryIO, name: str, max_pixels: int) -> tuple[Image.Image, str | None]:
    try:
        image = Image.open(stream, formats=_READABLE)
    except Image.DecompressionBombError as error:
        pixels = re.findall(r"\d+", str(error))[0]
        raise InputError(_too_large(name, int(pixels), max_pixels)) from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name} is not a picture that can be read; give a PNG, JPEG or WebP file") from None
    except _DAMAGE as error:
        raise InputError(_damaged(name, error)) from None
    return _decode_picture(image, name, max_pixels)


def _decode_picture(image: Image.Image, name: str, max_pixels: int) -> tuple[Image.Image, str | None]:
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name} has no pixels ({width}x{height}); give a picture of at least 1x1")
    if width * height > max_pixels:
        raise InputError(_too_large(f"{name} ({width}x{height})", width * height, max_pixels))
    try:
        image.load()
        text = image.info.get(_METADATA_KEY) or image.getexif().get(_EXIF_DESCRIPTION)
        return _to_rgb(ImageOps.exif_transpose(image), name), text
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(_damaged(name, error)) from None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point pixels, whose range is unknown; save it as 8- or 16-bit PNG")
    if image.mode.startswith("I"):                       # "I", "I;16", "I;16B", ...: 16-bit grey
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name} holds values from {values.min()} to {values.max()}; the range of 16-bit "
                             "pictures is 0 to 65535: save it as 8- or 16-bit PNG")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (*WHITE, 255)), over).convert("RGB")
    return image.convert("RGB")


def _too_large(name: str, pixels: int, limit: int) -> str:
    return f"{name} has {pixels} pixels, more than the limit of {limit}; make it smaller first"


def _damaged(name: str, error: BaseException) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{name} is damaged or cut off ({reason}); get the file again"


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def fit(image: Image.Image, size: tuple[int, int], mode: str = "pad", resample: str = "bicubic",
        background: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """`image` at `size` = (height, width); untouched if it has that size.

    mode: "pad" shows the whole picture, centred on `background`; "crop" fills the target and cuts what sticks out;
    "stretch" changes the proportions. resample: "bicubic" or "nearest" (no new colours appear).
    Raises UnknownNameError (mode, resample) and InputError (size).
    """
    height, width = size
    if mode not in RESIZE_MODES:
        raise UnknownNameError("resize mode", mode, RESIZE_MODES)
    if resample not in RESAMPLES:
        raise UnknownNameError("resampling", resample, RESAMPLES)
    if height < 1 or width < 1:
        raise InputError(f"size {height}x{width} has no pixels; give a height and width of at least 1")
    if image.size == (width, height):
        return image
    method = RESAMPLES[resample]
    if mode == "stretch":
        return image.resize((width, height), method)
    if mode == "crop":
        return ImageOps.fit(image, (width, height), method)
    scale = min(width / image.width, height / image.height)
    inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
    canvas = Image.new("RGB", (width, height), background)
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return canvas


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """The centre square of `size` pixels as ADM (Dhariwal and Nichol 2021) prepares ImageNet: the shorter side is
    halved with a box filter while it is at least twice `size`, then scaled to `size` bicubically, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def to_tensor(image: Image.Image) -> Tensor:
    """image_3HW, float32 in [-1, 1]: 2 v / 255 - 1."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(127.5).sub(1)


def to_pil(image_3HW: Tensor) -> Image.Image:
    """The picture of a tensor in [-1, 1] (values outside are clipped): clamp(127.5 x + 128, 0, 255), truncated, which
    is the exact inverse of `to_tensor`."""
    pixels_HW3 = image_3HW.detach().float().mul(127.5).add(128).clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(pixels_HW3.cpu().contiguous().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def make_grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size in rows of `columns` (default ceil(sqrt(n))), `gap` white pixels between them; a single
    picture is returned as it is. Raises InputError if there are none or if their sizes differ."""
    if not images:
        raise InputError("a grid of 0 pictures was asked for; give at least 1")
    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    for image in images:
        if image.size != (width, height):
            raise InputError(f"a grid needs pictures of one size, not {width}x{height} and {image.width}x"
                             f"{image.height}; fit them first")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), WHITE)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + gap), row * (height + gap)))
    return grid


def check_output(path: str | os.PathLike[str], format: str | None = None) -> str:
    """The format ("png", "webp" or "jpeg") in which `path` would be saved: `format`, or by the suffix.

    Raises UnknownNameError (format) and InputError: unknown suffix, folder missing, `path` not a file. Call it before
    long work whose result goes to `path`.
    """
    target = Path(path)
    if format is not None and format not in FORMATS:
        raise UnknownNameError("picture format", format, FORMATS)
    if format is None and target.suffix.lower() not in _SUFFIXES:
        raise InputError(f"output {str(path)!r} has the suffix {target.suffix!r}, which names no known picture format; "
                         f"use one of {', '.join(_SUFFIXES)}")
    check_target(target)
    return format or _SUFFIXES[target.suffix.lower()]


def save_image(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None,
               format: str | None = None) -> None:
    """Write a picture in one step: either the whole file is there afterwards, or nothing changed (also on Ctrl-C).

    `metadata` (JSON-able) goes into the PNG text chunk "arimg", in WebP and JPEG into the EXIF description;
    `read_metadata` gives it back. `format`: "png", "webp" or "jpeg"; None takes it from the suffix.
    Raises InputError (folder missing or not writable, disk full, not encodable) and UnknownNameError (format).
    """
    kind = check_output(path, format)
    options = dict(_ENCODING[kind])
    if metadata is not None:
        text = json.dumps(metadata)
        if kind == "png":
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_text(_METADATA_KEY, text)
        else:
            options["exif"] = Image.Exif()
            options["exif"][_EXIF_DESCRIPTION] = text
    encoded = io.BytesIO()
    try:
        image.save(encoded, kind, **options)
    except (OSError, ValueError) as error:               # e.g. WebP ends at 16383 pixels a side
        raise InputError(f"a {image.width}x{image.height} picture of mode {image.mode} cannot be written as {kind} "
                         f"({error}); use png") from None
    with replacing(path) as stream:
        stream.write(encoded.getbuffer())


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises InputError for what the operating system refuses: no such folder, no permission, disk full.
    """
    target = Path(path)
    check_target(target)
    draft = target.with_name(f".arimg-{secrets.token_hex(6)}.tmp")
    try:
        try:
            with draft.open("xb") as stream:
                yield stream
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written: {error.strerror or error}; free space there or "
                         "choose another place") from None


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises InputError when no file can be written at `path`: a folder, no regular file, or in a folder that is
    missing or may not be written to."""
    target = Path(path)
    try:
        if target.is_dir():
            raise InputError(f"output {str(target)!r} is a folder; add a file name")
        if target.exists() and not target.is_file():
            raise InputError(f"output {str(target)!r} is not a regular file; choose another name")
        if target.parent.exists() and not target.parent.is_dir():
            raise InputError(f"output folder {str(target.parent)!r} is not a folder; choose another place")
        if not target.parent.is_dir():
            raise InputError(f"output folder {str(target.parent)!r} does not exist; type: mkdir -p {target.parent}")
        if not os.access(target.parent, os.W_OK):
            raise InputError(f"output folder {str(target.parent)!r} may not be written to; choose another place")
    except OSError as error:
        raise InputError(f"output {str(target)!r} cannot be written: {error.strerror}; choose another place") from None
