"""What a network says about tokens yet to come, for all guidance branches: one interface over a causal network, whose
past lies in a cache, and a masked one, which reads any set of known tokens. Decoders of continuous tokens use no other.

Letters: B images; G guidance branches; R = G*B rows; W steps read together; L tokens; C channels; D width; N tokens
that are predicted, image after image, in the order of steps, then of positions; Q contexts of a masked network.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.accel.plan import Plan, Ramp, branches_of, given_tokens, guidance_scales, masked_plan, raster_plan
from arimg.accel.target import branch_condition, branch_inject
from arimg.errors import InputError
from arimg.models.base import Condition, HeadSample, order_of
from arimg.noise import Purpose

CONTEXT_ROWS = 256      # rows that a masked network reads at once


class Tokens(NamedTuple):
    """N tokens: their image, which of the W steps predicts them, and their position."""

    images_N: Tensor
    offsets_N: Tensor
    positions_N: Tensor


class Contexts(Protocol):
    """The run state of one network in one decode."""

    passes: int

    def read(self, canvas_BLC: Tensor, steps_BW: Tensor, tokens: Tokens) -> Tensor:
        """z_GND of the tokens that the steps predict, each given all tokens of the canvas that come before its step.
        Steps of an image follow one another; those behind its last predict nothing."""

    def forget(self, steps_B: Tensor) -> None:
        """Tokens of these steps and of later ones will be replaced."""


class CausalContexts:
    """A causal network: one pass reads the tokens that are not in the cache yet, and those before the steps asked for.
    Token j is predicted by the slot before it, so step j reads token j-1. Rows advance on their own."""

    def __init__(self, backbone: Any, request: DecodeRequest, branches: Collection[str]) -> None:
        self.passes = 0
        self._backbone, self._request, self._branches = backbone, request, tuple(branches)
        self._inject_KBLD = request.inject_KBLD
        self._condition = branch_condition(backbone, request.condition, branches)
        self._cache: Any = None
        self._read_B = torch.zeros_like(request.seeds_B)        # tokens in the cache

    def read(self, canvas_BLC: Tensor, steps_BW: Tensor, tokens: Tokens) -> Tensor:
        """See Contexts."""
        self.passes += 1
        batch, length, prefix = len(steps_BW), self._request.length, self._backbone.prefix_length
        last_B = torch.where(steps_BW < length, steps_BW, -1).amax(1)
        last_B = torch.where(last_B < 0, self._read_B, last_B)  # nothing is asked of this image
        begin = self._cache is None
        width = max(0 if begin else 1, int((last_B - self._read_B).max()))
        top_B = last_B.amax().expand(batch) if begin else last_B    # the prefix is read in front of equal columns
        reads_BW = (top_B[:, None] - width + torch.arange(width, device=last_B.device)).clamp(0, length - 1)
        self._read_B = torch.maximum(self._read_B, last_B)
        rows = torch.arange(batch, device=last_B.device)[:, None]
        slots_RW = (prefix + reads_BW).repeat(len(self._branches), 1)
        units_RWC = canvas_BLC[rows, reads_BW].repeat(len(self._branches), 1, 1)
        x_RWD = self._backbone.embed(units_RWC, slots_RW)
        if begin:
            x_RPD = self._backbone.prefix(self._condition)
            x_RWD = torch.cat([x_RPD, x_RWD], dim=1)
            slots_RP = torch.arange(prefix, device=last_B.device).expand(len(x_RPD), -1)
            slots_RW = torch.cat([slots_RP, slots_RW], dim=1)
            self._cache = self._backbone.new_cache(len(x_RPD), prefix + length, self._request.grid)
        self._cache.limit(prefix + int(last_B.max()))
        h_RWD = self._backbone.step(x_RWD, slots_RW, self._cache, self._inject(slots_RW[:batch] - prefix + 1))
        steps_N = steps_BW[tokens.images_N, tokens.offsets_N]
        back_N = top_B[tokens.images_N] - steps_N + 1           # from the end: the last column predicts step top_B
        h_GBWD = h_RWD.unflatten(0, (-1, batch))
        return h_GBWD[:, tokens.images_N, h_RWD.shape[1] - back_N]

    def forget(self, steps_B: Tensor) -> None:
        """See Contexts."""
        self._read_B = torch.minimum(self._read_B, steps_B)

    def _inject(self, tokens_BW: Tensor) -> Tensor | None:
        """inject_KRWD of the passes that predict these tokens; zero before the first token and behind the last one."""
        if self._inject_KBLD is None:
            return None
        padded_KBMD = F.pad(self._inject_KBLD, (0, 0, 0, 1))
        length = self._inject_KBLD.shape[2]
        index_BW = torch.where(tokens_BW < 0, length, tokens_BW)
        rows = torch.arange(len(index_BW), device=index_BW.device)[:, None]
        return branch_inject(padded_KBMD[:, rows, index_BW], self._branches)


class MaskedContexts:
    """A masked network: one context per step and image that has tokens to predict, in batches of CONTEXT_ROWS rows."""

    def __init__(self, backbone: Any, request: DecodeRequest, plan: Plan, branches: Collection[str]) -> None:
        self.passes = 0
        self._backbone, self._plan, self._branches = backbone, plan, tuple(branches)
        self._inject_KBLD = request.inject_KBLD
        self._condition = branch_condition(backbone, request.condition, branches)

    def read(self, canvas_BLC: Tensor, steps_BW: Tensor, tokens: Tokens) -> Tensor:
        """See Contexts."""
        return self.read_known(canvas_BLC, self._plan.known(steps_BW), tokens)

    def read_known(self, canvas_BLC: Tensor, known_BWL: Tensor, tokens: Tokens) -> Tensor:
        """z_GND of the tokens, those of offset w given the known ones of row w of their image."""
        self.passes += 1
        width, most = known_BWL.shape[1], max(1, CONTEXT_ROWS // len(self._branches))
        pairs_N, inverse_N = torch.unique(tokens.images_N * width + tokens.offsets_N, return_inverse=True)
        chunks = []
        for first, pairs_Q in zip(range(0, len(pairs_N), most), pairs_N.split(most)):
            here_N = (inverse_N >= first) & (inverse_N < first + most)
            z_GQLD = self._contexts(canvas_BLC, known_BWL, pairs_Q // width, pairs_Q % width)
            chunks.append(z_GQLD[:, inverse_N[here_N] - first, tokens.positions_N[here_N]])
        return torch.cat(chunks, dim=1)

    def forget(self, steps_B: Tensor) -> None:
        """See Contexts; there is no cache."""

    def _contexts(self, canvas_BLC: Tensor, known_BWL: Tensor, images_Q: Tensor, offsets_Q: Tensor) -> Tensor:
        """z_GQLD."""
        batch, branches = len(canvas_BLC), len(self._branches)
        class_ids_R = self._condition.class_ids_B
        assert class_ids_R is not None
        ids_GQ = class_ids_R.unflatten(0, (branches, batch))[:, images_Q]
        inject_KQLD = None if self._inject_KBLD is None else self._inject_KBLD[:, images_Q]
        z_RLD = self._backbone.context(
            Condition(class_ids_B=ids_GQ.flatten()), canvas_BLC[images_Q].repeat(branches, 1, 1),
            known_BWL[images_Q, offsets_Q].repeat(branches, 1), branch_inject(inject_KQLD, self._branches))
        return z_RLD.unflatten(0, (branches, -1))


def is_masked(backbone: Any) -> bool:
    """Whether the network reads any set of known tokens; else it is causal."""
    return hasattr(backbone, "context")


@dataclass(frozen=True)
class Drawn:
    """Tokens that steps predict, with the Gaussians they were drawn from."""

    tokens: Tokens
    sample: HeadSample


class Network:
    """One network in one decode: contexts, guidance and head."""

    def __init__(self, backbone: Any, request: DecodeRequest, plan: Plan, ramp: Ramp, last_noise: bool) -> None:
        branches = branches_of(request, ramp)
        self.contexts: Contexts = CausalContexts(backbone, request, branches)
        if is_masked(backbone):
            self.contexts = MaskedContexts(backbone, request, plan, branches)
        self.head_tokens = 0
        self._head, self._last_noise = backbone.head, last_noise
        self._request, self._plan, self._ramp = request, plan, ramp

    @property
    def passes(self) -> int:
        """Of the transformer."""
        return self.contexts.passes

    def draw(self, canvas_BLC: Tensor, steps_BW: Tensor) -> Drawn:
        """The tokens that these steps predict. Noise is keyed by (seed, position, head step): what a token is depends
        on its context and its own noise alone."""
        tokens = Tokens(*self._plan.predicted(steps_BW).nonzero(as_tuple=True))
        if not len(tokens.images_N):
            empty_NC = canvas_BLC.new_zeros(0, canvas_BLC.shape[2])
            return Drawn(tokens, HeadSample(empty_NC, empty_NC, empty_NC, empty_NC))
        z_GND = self.contexts.read(canvas_BLC, steps_BW, tokens)
        steps_N = steps_BW[tokens.images_N, tokens.offsets_N]
        return Drawn(tokens, self.speak(z_GND, tokens, steps_N, canvas_BLC))

    def speak(self, z_GND: Tensor, tokens: Tokens, steps_N: Tensor, canvas_BLC: Tensor) -> HeadSample:
        """The head's tokens for these conditions, with the guidance of these steps."""
        self.head_tokens += len(steps_N)
        request, head = self._request, self._head
        scales_GN = guidance_scales(request, self._plan, self._ramp, tokens.images_N, steps_N, tokens.positions_N,
                                    canvas_BLC.dtype)
        noise_NSC = head_noise(request, tokens, head.draws, head.channels).to(canvas_BLC.dtype)
        return head.sample(z_GND, noise_NSC, scales_GN, request.sampling.temperature, self._last_noise)


def head_noise(request: DecodeRequest, tokens: Tokens, draws: int, channels: int) -> Tensor:
    """noise_NSC of each token's seed and position."""
    seeds_N, positions_N1 = request.seeds_B[tokens.images_N], tokens.positions_N[:, None]
    flat_N1M = request.noise.normal(seeds_N, positions_N1, draws * channels, Purpose.HEAD)
    return flat_N1M[:, 0].unflatten(-1, (draws, channels))


def open_plan(backbone: Any, request: DecodeRequest) -> tuple[Plan, Tensor]:
    """The plan of a decode and its canvas_BLC, zero where the model is free. Raises InputError."""
    given_BLC = given_tokens(request, backbone.head.channels)
    free_BL = given_BLC.isnan().any(-1)
    plan = masked_plan(request, free_BL) if is_masked(backbone) else raster_plan(request, free_BL)
    dtype = torch.promote_types(next(backbone.parameters()).dtype, torch.float32)
    return plan, torch.where(free_BL[..., None], 0.0, given_BLC).to(dtype)


def check_draft(draft: Any, backbone: Any, request: DecodeRequest) -> None:
    """Raises InputError where `draft` cannot draft for `backbone`."""
    if (order_of(draft) != "continuous" or is_masked(backbone) != is_masked(draft)
            or backbone.head.channels != draft.head.channels):
        raise InputError("the draft network and the model are of different kinds; draft with a smaller model of the "
                         "same kind and tokenizer")
    for network in (backbone, draft):
        check_density(network.head, request)
    ours, theirs = (getattr(network, "config", None) for network in (backbone, draft))
    for name, what in (("num_classes", "classes"), ("grid", "tokens per side")):
        if getattr(ours, name, None) != getattr(theirs, name, None):
            raise InputError(f"the draft network has {getattr(theirs, name, None)} {what}, the model "
                             f"{getattr(ours, name, None)}; draft with a model of the same pictures and classes")
    if request.inject_KBLD is not None:
        points, width = request.inject_KBLD.shape[0], request.inject_KBLD.shape[-1]
        if theirs is None or (draft.inject_points, theirs.dim) != (points, width):
            raise InputError(f"this model's control has {points} points of width {width}, and the draft network cannot "
                             "take it; draft with a model of the same width and points, or without control")


def check_density(head: Any, request: DecodeRequest) -> None:
    """Raises InputError where the head's last step has no density."""
    if not head.has_density or request.sampling.temperature == 0:
        raise InputError("the last step of this head has no noise, so a token has no density; take the ancestral "
                         "sampler (or a flow head with last_std above 0) and a temperature above 0, or "
                         "jacobi-continuous")
