"""The recipe inside a picture: the options and control images it was made from, written and read back."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from arimg import __version__
from arimg.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_CONTROLS = "arimg.recipe.controls"         # key in ctx.meta: (source, picture) of each control
# Never taken from a recipe, which may be a stranger's: what is read and written here, and where it runs.
_CALLERS = ("control", "control_from", "output", "format_name", "json_path", "trace_path", "device", "threads")


def record(options: dict[str, Any], sources: Sequence[str | None], maps: Sequence[Tensor]) -> dict[str, Any]:
    """JSON-able: options as they would be typed, and the control images as the model saw them, as PNG in base64."""
    from arimg.images import to_pil

    typed = {name: _as_typed(name, value) for name, value in sorted(options.items())
             if name not in _CALLERS and value is not False and value not in (None, ())}
    pngs = [_png(to_pil(one_R3HW[0])) for one_R3HW in maps]
    controls = [{"source": source, "sha256": hashlib.sha256(png).hexdigest(), "png": base64.b64encode(png).decode()}
                for source, png in zip(sources, pngs, strict=True)]
    return {"arimg": __version__, "options": typed, "controls": controls}


def _as_typed(name: str, value: Any) -> Any:
    if name == "size":
        return f"{value[0]}x{value[1]}"
    if name == "cfg_interval":
        return f"{value[0]}:{'' if value[1] is None else value[1]}"
    return list(value) if isinstance(value, tuple) else value


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def with_seeds(recorded: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """The recipe of some of the pictures: those with these (consecutive) seeds."""
    return {**recorded, "options": {**recorded["options"], "seed": seeds[0], "n": len(seeds)}}


def as_defaults(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Callback of the eager option --from: its recipe becomes the defaults of all other options.

    Raises InputError when the file carries no recipe or a damaged one.
    """
    if path is None:
        return
    from arimg.images import read_metadata

    recorded = read_metadata(path)
    options, entries = recorded.get("options"), recorded.get("controls")
    if not isinstance(options, dict) or not isinstance(entries, list):
        raise InputError(f"--from {path}: its arimg metadata holds no recipe; give a picture written by arimg sample")
    ctx.default_map = {param.name: _read_option(path, param, options[param.name]) for param in ctx.command.params
                       if param.name in options and param.name not in _CALLERS}
    ctx.meta[_CONTROLS] = [_read_control(path, entry) for entry in entries]


def _read_option(path: str, param: click.Parameter, value: Any) -> str | list[str]:
    """The value as it would be typed; a list of them for an option that may be repeated. Raises InputError."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) != getattr(param, "multiple", False) or not all(
            isinstance(one, (str, int, float)) for one in values):
        raise InputError(f"--from {path}: {param.name} = {value!r} in its recipe is damaged; use the file as arimg "
                         "wrote it")
    return [str(one) for one in values] if isinstance(value, list) else str(value)


def _read_control(path: str, entry: Any) -> tuple[str | None, Image.Image]:
    from arimg.images import load_image

    try:
        source, png = entry["source"], base64.b64decode(entry["png"], validate=True)
        intact = hashlib.sha256(png).hexdigest() == entry["sha256"]
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise InputError(f"--from {path}: a control image in its recipe is damaged; give --control FILE beside --from")
    return source, load_image(png, f"the control image inside {path}")


def controls(ctx: click.Context, given: Sequence[str], photos: Sequence[str]) -> tuple[list[str | None], list[Any]]:
    """(sources, control images or their paths): the recipe's, unless the command line names a control or a photo."""
    recorded = ctx.meta.get(_CONTROLS, [])
    if recorded and not given and not photos:
        return [source for source, _ in recorded], [picture for _, picture in recorded]
    return [*given, *photos], list(given)


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write the whole file or nothing. Raises InputError."""
    from arimg.images import replacing

    with replacing(path) as stream:
        stream.write((json.dumps(content, indent=2) + "\n").encode())
