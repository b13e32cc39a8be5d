"""The contract of every decoder: what goes in, what comes out, what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from arimg.errors import InputError, UnknownNameError
from arimg.models.base import Condition
from arimg.noise import CounterNoise

if TYPE_CHECKING:
    from arimg.accel.target import Target
    from arimg.tokenizers.base import TokenSpace

Guarantee = Literal["same-codes", "same-law", "tolerance", "none"]
GUIDANCE_ORDERS = ("class-first", "control-first")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. Raises InputError on values out of range or an empty interval, UnknownNameError on
    another order."""

    cfg: float = 1.0                                # scale; 1 = off
    control_cfg: float | None = None                # scale of the control alone; None = the same as cfg
    interval: tuple[int, int | None] = (0, None)    # token positions [first, stop) that are guided; None = to the end
    order: str = "class-first"                      # which of the two is added first, see accel/target.py
    plausibility: float = 0.0                       # least share of the best code's unguided probability; 0 = any code

    def __post_init__(self) -> None:
        if self.order not in GUIDANCE_ORDERS:
            raise UnknownNameError("guidance order", self.order, GUIDANCE_ORDERS)
        for name, value in (("cfg", self.cfg), ("control-cfg", self.control_cfg)):
            if value is not None and (not math.isfinite(value) or value < 0):
                raise InputError(f"--{name} {value}: a guidance scale is a finite number >= 0; 1 switches guidance off")
        if not 0 <= self.plausibility <= 1:
            raise InputError(f"--plausibility {self.plausibility}: needs a number in [0, 1]; 0 bars no code, 0.1 those "
                             "that the model finds ten times less likely than the best one")
        first, stop = self.interval
        if first < 0 or (stop is not None and stop <= first):
            raise InputError(f"--cfg-interval {first}:{'' if stop is None else stop}: needs 0 <= first < stop; "
                             "give token positions, for example 0:128")


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn from the guided logits, in this order. Raises InputError on values out of range."""

    temperature: float = 1.0    # 0 = the most likely code
    top_k: int = 0              # 0 = all codes; ties with the k-th survive
    top_p: float = 1.0          # 1 = all codes; the first code that crosses p survives

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"--temperature {self.temperature}: needs a finite number >= 0; 1 is the model's own law, "
                             "0 always takes the most likely code")
        if self.top_k < 0:
            raise InputError(f"--top-k {self.top_k}: needs a whole number >= 0; 0 keeps every code")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: needs a number in (0, 1]; 1 keeps every code")


def token_scales(space: "TokenSpace | None", grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The scales of a tokenizer that has several, else the grid alone."""
    return (grid,) if space is None or space.scales is None else space.scales


@dataclass(frozen=True)
class DecodeRequest:
    """One batch of images to decode. Every tensor lies on the model's device."""

    condition: Condition                            # B rows
    grid: tuple[int, int]                           # (h, w) in tokens, of the finest scale
    seeds_B: Tensor                                 # int64: image k's own seed
    inject_KBLD: Tensor | None = None               # row j is added where token j is predicted; None = no control
    guidance: Guidance = Guidance()
    sampling: Sampling = Sampling()
    space: "TokenSpace | None" = None               # for decoders that need the codebook
    forced_BL: Tensor | None = None                 # int64; -1 = free
    forced_BLC: Tensor | None = None                # the same for continuous tokens; NaN = free
    draft_BL: Tensor | None = None                  # int64; codes to verify
    steps: int | None = None                        # for decoders with a number of steps
    noise: CounterNoise = CounterNoise()

    @property
    def scales(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of every scale of tokens, coarse to fine; one scale for a raster."""
        return token_scales(self.space, self.grid)

    @property
    def length(self) -> int:
        """L, over all scales."""
        return sum(height * width for height, width in self.scales)


@dataclass(frozen=True)
class StepInfo:
    """What a decoder reports after each pass."""

    forward_pass: int           # 1, 2, ...
    fixed_tokens: int           # tokens fixed so far, over all images
    total_tokens: int           # B * L
    codes_BL: Tensor            # codes so far; only fixed positions mean anything


OnStep = Callable[[StepInfo], None]


@dataclass(frozen=True)
class DecodeStats:
    """What a decode cost."""

    forward_passes: int                                             # of the model, prefix pass included
    accepted_per_pass: tuple[float, ...] = ()                       # mean over images, one entry per pass
    seconds: dict[str, float] = field(default_factory=dict)         # "control", "tokens", "pixels"
    extra: dict[str, Any] = field(default_factory=dict)             # a decoder's own figures


@dataclass(frozen=True)
class DecodeResult:
    """Codes and / or latents of B images, in raster order, scale after scale. Where there are latents, the picture is
    painted from these."""

    stats: DecodeStats
    codes_BL: Tensor | None = None
    latents_BLC: Tensor | None = None


class Decoder(Protocol):
    """Turns a request into codes. `guarantee` is relative to the plain decoder of the same model."""

    @property
    def guarantee(self) -> Guarantee:
        """What it promises."""

    def decode(self, target: "Target", request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """Decode one batch."""
