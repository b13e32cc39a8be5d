"""The arguments of a pipeline call: names, aliases, defaults, and what follows from them alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch

from arimg.accel.base import Decoder, OnStep
from arimg.checkpoints import PipelineSettings
from arimg.errors import InputError, UnknownNameError
from arimg.images import MAX_PIXELS, RESIZE_MODES

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DIFFUSERS_NAMES = {
    "guidance_scale": "cfg",
    "controlnet_conditioning_scale": "control_scale",
    "control_guidance_start": "control_start",
    "control_guidance_end": "control_end",
    "class_labels": "class_id",
    "num_images_per_prompt": "n",
    "height": "size",
    "width": "size",
    "generator": "seed",
}
MAX_PICTURES = 1024
_MODEL_DEFAULTS = ("size", "decoder", "cfg", "control_cfg", "guidance_order", "plausibility",
                   "temperature", "top_k", "top_p")
_EXCLUSIVE = (("class_name", "class_id", "class_labels", "prompt", "prompt_embeds"), ("seed", "seeds", "generator"))


@dataclass(frozen=True)
class CallOptions:
    """What a call may say, under the names of the command line. `call_options` fills in the model's own values where a
    field says so and the caller does not.

    A control is a path, a PIL picture, a uint8 array (H, W) or (H, W, 3), or a tensor (3, H, W) or (B, 3, H, W) in
    [-1, 1] that has the picture's size already. A list of controls adds up; `control_type`, `control_scale`,
    `control_start` and `control_end` are one value for all of them or one for each.
    """

    control: Any = None
    control_from: Any = None                                # photo(s) whose maps are extracted first
    control_type: str | Sequence[str] | None = None         # None = the first that the model was trained on
    control_scale: float | Sequence[float] = 1.0
    control_start: float | Sequence[float] = 0.0            # parts of the raster order, or of the scales
    control_end: float | Sequence[float] = 1.0
    control_cfg: float | None = None                        # guidance of the control alone; the model's own, None = cfg
    guidance_order: str = "class-first"                     # or control-first; the model's own
    plausibility: float = 0.0                               # codes guidance may choose; the model's own
    resize: str = "pad"                                     # how a control of another size is fitted
    class_name: str | Sequence[str] | None = None           # a list = one picture (or n) for each
    class_id: int | Sequence[int] | None = None
    prompt: str | Sequence[str] | None = None
    prompt_embeds: torch.Tensor | None = None               # (P, C) or (B, P, C), left-padded
    prompt_attention_mask: torch.Tensor | None = None       # (P,) or (B, P); None = all real
    decoder: str | Decoder = "ar"                           # the model's own
    window: int | str | None = None                         # positions per pass, or "auto"; None = the decoder's own
    lossy: bool = False                                     # allow decoders that do not keep the model's law
    verify: bool = False                                    # correct a one-step decoder's codes to the model's own
    audit: bool = False                                     # score the codes against plain decoding (one pass more)
    steps: int | None = None                                # for decoders with a number of steps
    cfg: float = 1.0                                        # the model's own
    cfg_interval: tuple[int, int | None] = (0, None)        # token positions [first, stop) that are guided
    temperature: float = 1.0                                # the model's own
    top_k: int = 0                                          # the model's own
    top_p: float = 1.0                                      # the model's own
    seed: int = 0                                           # picture k has seed + k
    seeds: Sequence[int] | None = None                      # one for each picture
    n: int = 1                                              # pictures per class or prompt
    threads: int | None = None                              # of the decode on a CPU; None = see arimg/threads.py
    size: tuple[int, int] = (256, 256)                      # (height, width) in pixels; the model's own
    forced: Any = None                                      # codes (L) or (B, L) to keep; -1 = free
    forced_latents: Any = None              # the same for continuous tokens: (B or 1, C, h, w); NaN = free
    draft: Any = None                                       # codes (L) or (B, L) for decoders that verify
    output_type: str = "pil"                                # pil | np | pt (both in [0, 1]) | latent
    return_dict: bool = True
    on_step: OnStep | None = None
    callback_on_step_end: Callable[..., Any] | None = None  # (pipeline, step, fixed tokens, {"codes": codes_BL})

    def __post_init__(self) -> None:
        if self.output_type not in OUTPUT_TYPES:
            raise UnknownNameError("output type", str(self.output_type), OUTPUT_TYPES)
        if self.resize not in RESIZE_MODES:
            raise UnknownNameError("resize mode", str(self.resize), RESIZE_MODES)
        check_count(self.n)
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}; give at least 1, or leave it out")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps is {self.steps}; a decoder needs at least 1 step")


def check_count(n: int) -> None:
    """Raises InputError unless 1 <= n <= MAX_PICTURES."""
    if not 1 <= n <= MAX_PICTURES:
        raise InputError(f"n is {n}; ask for 1 to {MAX_PICTURES} pictures at once")


def call_options(given: Mapping[str, Any], settings: PipelineSettings) -> CallOptions:
    """The options of one call: diffusers names translated, the model's defaults filled in.

    Raises InputError when a name and its alias, or two options that exclude each other, are given; TypeError on a name
    that is no option.
    """
    known = [field.name for field in fields(CallOptions)]
    for name in given:
        if name not in known and name not in DIFFUSERS_NAMES:
            close = get_close_matches(name, [*known, *DIFFUSERS_NAMES], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"a pipeline call has no option {name!r}{hint}")
    given = {name: value for name, value in given.items() if value is not None}
    for alias, name in DIFFUSERS_NAMES.items():
        if alias in given and name in given:
            raise InputError(f"{name} and its diffusers name {alias} are both given; keep one of them")
    for group in _EXCLUSIVE:
        found = [name for name in group if name in given]
        if len(found) > 1:
            raise InputError(f"{' and '.join(found)} exclude each other; give one of them")
    options = {name: value for name, value in given.items() if name in known}
    for alias, value in given.items():
        if alias in DIFFUSERS_NAMES:
            options.update(_translated(alias, value, options, settings))
    defaults = {name: getattr(settings, name) for name in _MODEL_DEFAULTS if name not in options}
    return CallOptions(**{**options, **defaults})


def _translated(alias: str, value: Any, options: Mapping[str, Any], settings: PipelineSettings) -> dict[str, Any]:
    """The option behind a diffusers name, with its value in our form."""
    if alias in ("height", "width"):
        height, width = options.get("size") or settings.size
        return {"size": (value, width) if alias == "height" else (height, value)}
    if alias == "generator":
        if isinstance(value, torch.Generator):
            return {"seed": _generator_seed(value)}
        return {"seeds": [_generator_seed(generator) for generator in value]}
    return {DIFFUSERS_NAMES[alias]: value}


def _generator_seed(generator: torch.Generator) -> int:
    """The seed it was made with: how far it has been used does not matter."""
    return generator.initial_seed() % 2 ** 63


def as_list(value: Any) -> list[Any]:
    """A list or tuple as a list, None as an empty one, anything else as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def image_seeds(options: CallOptions, conditions: int) -> list[int]:
    """One seed per picture of a call with this many classes, prompts or maps; several seeds set the number of pictures.

    Raises InputError on counts that do not match and on seeds that are no whole numbers of 63 bits.
    """
    count = conditions * options.n
    seeds = options.seeds
    if seeds is None:
        seeds = [_checked_seed(options.seed) + k for k in range(count)]
    elif not seeds or (len(seeds) != count and count > 1):
        raise InputError(f"{len(seeds)} seeds for {count} pictures; give one for each")
    return [_checked_seed(seed) for seed in seeds]


def _checked_seed(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2 ** 63:
        raise InputError(f"seed {seed}: a seed is a whole number from 0 to 2**63 - 1, for example 0")
    return number


def checked_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """`size` = (height, width) if both are multiples of the stride. Raises InputError that names the nearest size."""
    height, width = size
    if height < 1 or width < 1 or height % stride or width % stride:
        nearest = "x".join(str(max(stride, round(side / stride) * stride)) for side in size)
        raise InputError(f"size {height}x{width}: both sides must be multiples of {stride}; the nearest is {nearest}")
    if height * width > MAX_PIXELS:
        raise InputError(f"size {height}x{width}: more than the limit of {MAX_PIXELS} pixels; choose a smaller one")
    return height, width
