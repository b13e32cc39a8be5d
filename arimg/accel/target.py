"""The law that every decoder samples from: guidance branches are formed and mixed here, implausible codes barred, and
temperature, top-k and top-p applied here, once, in float32 (float64 models stay in float64).

Guidance acts on token j with a share r(j): full + r (guided - full). In raster order r is 1 inside the interval of
positions and 0 outside; in the order of scales it also ramps up, r = k / (S - 1) for the tokens of scale k = 0 .. S-1
(VAR), so that the first scale is unguided and cfg_k = 1 + r (cfg - 1). VAR's own files call cfg - 1 the guidance scale.

Letters: B images; G guidance branches; R = G*B rows; W positions of a pass; L tokens; V codes; P prefix slots.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.models.base import Backbone, Condition, order_of
from arimg.models.layers import at_least_float32
from arimg.noise import largest

FULL, CLASS, MAP, NULL = "full", "class", "map", "null"     # condition + control; either alone; neither


def branch_scales(guidance: Guidance, controlled: bool, ramp: bool = False) -> dict[str, float]:
    """The branches that must be computed, each with the scale of the step that leads to it, in the order of rows.

    class-first:   guided = null + cfg * (class - null) + control_cfg * (full - class)
    control-first: guided = null + control_cfg * (map - null) + cfg * (full - map)

    (the latter as Brooks et al. 2023, arXiv:2211.09800, equation 3). So with a the scale of the first step and b that
    of the second, the weights are b, a - b and 1 - a. A branch of weight 0 drops out of the chain without changing the
    other scales; control_cfg = cfg leaves null + cfg * (full - null) (Ho and Salimans 2022). Outside an interval, on a
    ramp and for the plausibility of codes `full` is needed by itself.
    """
    control_cfg = guidance.control_cfg if controlled and guidance.control_cfg is not None else guidance.cfg
    if guidance.order == "class-first":
        first, a, b = CLASS, guidance.cfg, control_cfg
    else:
        first, a, b = MAP, control_cfg, guidance.cfg
    weights = {FULL: b, first: a - b, NULL: 1 - a}
    scales = {FULL: b, first: a, NULL: 1.0}
    limited = ramp or guidance.interval != (0, None) or guidance.plausibility > 0
    return {name: scales[name] for name in scales if weights[name] or (name == FULL and limited)}


def branch_condition(backbone: Backbone, condition: Condition, branches: Collection[str]) -> Condition:
    """The conditions of these branches, one after the other."""
    return Condition.cat([backbone.null(condition) if name in (MAP, NULL) else condition for name in branches])


def branch_inject(inject_KBWD: Tensor | None, branches: Collection[str]) -> Tensor | None:
    """inject_KRWD of these branches: those that see the control come first, the others get zero; None: none sees it."""
    seeing = sum(name in (FULL, MAP) for name in branches)
    if inject_KBWD is None or not seeing:
        return None
    return F.pad(inject_KBWD.repeat(1, seeing, 1, 1), (0, 0, 0, 0, 0, (len(branches) - seeing) * inject_KBWD.shape[1]))


def mix(logits_GBWV: Tensor, scales: dict[str, float]) -> Tensor:
    """guided_BWV from the branches in the order of `scales`: the chain of `branch_scales`, from its last branch up."""
    branches = list(zip(scales.values(), logits_GBWV))[::-1]
    guided_BWV = branches[0][1]
    for (_, lower_BWV), (scale, upper_BWV) in zip(branches, branches[1:]):
        guided_BWV = guided_BWV + scale * (upper_BWV - lower_BWV)
    return guided_BWV


def bar_implausible(guided_BWV: Tensor, full_BWV: Tensor, plausibility: float) -> Tensor:
    """-inf for codes whose unguided probability is below `plausibility` times that of the likeliest code.

    Guidance divides probabilities: where two of them are near zero it may make a code that hardly ever occurs the
    likeliest. The constraint is that of contrastive decoding (Li et al. 2023, arXiv:2210.15097, equation 3).
    """
    if not plausibility:
        return guided_BWV
    least_BW1 = full_BWV.amax(-1, keepdim=True) + math.log(plausibility)
    return guided_BWV.masked_fill(full_BWV < least_BW1, float("-inf"))


def filter_probs(logits_BWV: Tensor, sampling: Sampling, from_below: bool = False) -> Tensor:
    """p_BWV after temperature, top-k (ties with the k-th survive) and top-p (the code that crosses p survives).

    `from_below`: VAR's reading of top-p, which adds up from the least likely code and cuts equal codes the other way.
    """
    logits_BWV = at_least_float32(logits_BWV)
    if sampling.temperature == 0:
        best_BW = largest(logits_BWV)
        return F.one_hot(best_BW, logits_BWV.shape[-1]).to(logits_BWV.dtype)
    logits_BWV = logits_BWV / sampling.temperature
    if 0 < sampling.top_k < logits_BWV.shape[-1]:
        kth_BW1 = logits_BWV.topk(sampling.top_k).values[..., -1:]
        logits_BWV = logits_BWV.masked_fill(logits_BWV < kth_BW1, float("-inf"))
    if sampling.top_p < 1:
        beyond = _tail if from_below else _beyond_nucleus
        logits_BWV = logits_BWV.masked_fill(beyond(logits_BWV, sampling.top_p), float("-inf"))
    return logits_BWV.softmax(-1)


def _beyond_nucleus(logits_BWV: Tensor, top_p: float) -> Tensor:
    """Bool: codes whose better-ranked codes already hold more than `top_p` (Holtzman et al. 2020)."""
    sorted_BWV = _descending(logits_BWV)
    held_BWV = sorted_BWV.softmax(-1).cumsum(-1)
    before_BWV = F.pad(held_BWV[..., :-1], (1, 0))
    return ~_among_first(logits_BWV, sorted_BWV, (before_BWV <= top_p).sum(-1, keepdim=True))


def _tail(logits_BWV: Tensor, top_p: float) -> Tensor:
    """Bool: codes that hold at most 1 - `top_p` together with all that are less likely; never the best one."""
    sorted_BWV = _descending(-logits_BWV)
    cut_BWV = (-sorted_BWV).softmax(-1).cumsum(-1) <= 1 - top_p
    cut_BWV[..., -1] = False
    return _among_first(-logits_BWV, sorted_BWV, cut_BWV.sum(-1, keepdim=True))


def _descending(values_BWV: Tensor) -> Tensor:
    """Sorted along the codes. On a CPU by numpy, which takes a tenth of torch's time."""
    if values_BWV.device.type != "cpu":
        return values_BWV.sort(dim=-1, descending=True).values
    return -torch.from_numpy(np.sort(-values_BWV.detach().numpy(), axis=-1))


def _among_first(values_BWV: Tensor, sorted_BWV: Tensor, count_BW1: Tensor) -> Tensor:
    """Bool: the `count` first codes in descending order; of equal ones those of lower number come first."""
    last_BW1 = sorted_BWV.gather(-1, (count_BW1 - 1).clamp_min(0))
    above_BWV, equal_BWV = values_BWV > last_BW1, values_BWV == last_BW1
    return above_BWV | equal_BWV & (equal_BWV.cumsum(-1) <= count_BW1 - above_BWV.sum(-1, keepdim=True))


class Target:
    """The run state of one decode: rows of all branches in one batch, their cache, and the number of passes so far.

    Call `start` first; it may be called again to begin anew. Positions are token positions in [0, L). In raster order
    `step` reads codes and returns the laws of the positions after them. A position may be read again with another code,
    which replaces the first. Reading position L-1 or beyond is allowed as a filler in ragged batches: its law means
    nothing and no other position sees it. In the order of scales `start` gives the laws of all tokens of the first
    scale, and `read` takes the cells of a map and returns the laws of the tokens at the very same positions.
    """

    def __init__(self, backbone: Backbone, request: DecodeRequest) -> None:
        self.request = request
        self.forward_passes = 0
        self._backbone = backbone
        self._by_scale = order_of(backbone) == "scales"
        self._scales = branch_scales(request.guidance, request.inject_KBLD is not None, ramp=self._by_scale)
        self._condition = branch_condition(backbone, request.condition, self._scales)
        inject = request.inject_KBLD
        self._inject_KBND = None if inject is None else F.pad(inject, (0, 0, 0, 1))     # N = L+1, the last row is zero
        self._cache: Any = None
        self._leaves = 0

    @property
    def backbone(self) -> Any:
        """The network, for decoders that run it by themselves."""
        return self._backbone

    def start(self, leaves: int = 0) -> Tensor:
        """Read the prefix. p_B1V: the law of token 0; or p_BPV: the laws of the first scale. `leaves`: how many leaves
        of a tree the passes may read."""
        return self._probs(self.start_logits(leaves))

    def step(self, codes_BW: Tensor, positions_BW: Tensor, reached: int = 0, stop: int | None = None,
             leaves: int = 0) -> Tensor:
        """Read int64 codes at positions. p_BWV: laws of the tokens at positions_BW + 1.

        Known on the host: `reached` promises that no position from here on is lower: once guidance has stopped for all
        of them, the other branches are no longer computed. `stop` promises that no position of this pass is that high
        and lets the cache read less (None = positions were read without gaps so far). The last `leaves` entries of the
        pass are leaves of a tree: other codes for their positions, seen by nothing, forgotten after the pass.
        """
        return self._probs(self.step_logits(codes_BW, positions_BW, reached, stop, leaves))

    def read(self, latents_BWC: Tensor, first: int) -> Tensor:
        """In the order of scales: read the cells of tokens first .. first+W-1, those of one or more whole scales.
        p_BWV: their laws. Every slot sees its own scale and the coarser ones."""
        return self._probs(self.read_logits(latents_BWC, first))

    def draw(self, p_BWV: Tensor, positions_BW: Tensor) -> Tensor:
        """codes_BW = argmax(log p + Gumbel noise of each image's seed at the positions of the drawn tokens)."""
        return self.request.noise.categorical(p_BWV, self.request.seeds_B, positions_BW)

    def start_logits(self, leaves: int = 0) -> Tensor:
        """As `start`, the guided logits before temperature and filters."""
        branches, length = len(self._scales), self._backbone.prefix_length
        tokens = length if self._by_scale else 1                # that the prefix predicts
        x_RPD = self._backbone.prefix(self._condition)
        slots_RP = torch.arange(length, device=x_RPD.device).repeat(x_RPD.shape[0], 1)
        self._leaves = leaves
        scratch: dict[str, Any] = {"scratch": leaves} if leaves else {}
        slots = self.request.length + (0 if self._by_scale else length)
        self._cache = self._backbone.new_cache(x_RPD.shape[0], slots, self.request.grid,
                                               self._condition.caption_mask_BP, **scratch)
        self.forward_passes = 1
        tokens_BT = slots_RP[:x_RPD.shape[0] // branches, :tokens]
        inject = self._inject(tokens_BT, self._scales)
        if inject is not None:
            inject = F.pad(inject, (0, 0, length - tokens, 0))
        if tokens == length:
            logits_RTV = self._backbone.predict(x_RPD, slots_RP, self._cache, inject)
        else:
            logits_RTV = self._backbone.logits(self._backbone.step(x_RPD, slots_RP, self._cache, inject)[:, -tokens:])
        return self._guided(logits_RTV, tokens_BT, self._scales)

    def read_logits(self, latents_BWC: Tensor, first: int) -> Tensor:
        """As `read`, the guided logits before temperature and filters."""
        branches, stop = len(self._scales), first + latents_BWC.shape[1]
        tokens_BW = torch.arange(first, stop, device=latents_BWC.device).expand(len(latents_BWC), -1)
        slots_RW = tokens_BW.repeat(branches, 1)
        self._cache.limit(stop)
        self.forward_passes += 1
        x_RWD = self._backbone.embed(latents_BWC.repeat(branches, 1, 1), slots_RW)
        logits_RWV = self._backbone.predict(x_RWD, slots_RW, self._cache, self._inject(tokens_BW, self._scales))
        return self._guided(logits_RWV, tokens_BW, self._scales)

    def step_logits(self, codes_BW: Tensor, positions_BW: Tensor, reached: int = 0, stop: int | None = None,
                    leaves: int = 0) -> Tensor:
        """As `step`, the guided logits before temperature and filters."""
        assert leaves <= self._leaves, (leaves, self._leaves)
        guided_stop, prefix = self.request.guidance.interval[1], self._backbone.prefix_length
        scales = self._scales if guided_stop is None or reached + 1 < guided_stop else {FULL: self._scales[FULL]}
        positions_BW = positions_BW.clamp(max=self.request.length - 1)
        tokens_BW = positions_BW + 1
        at_RW = slots_RW = torch.cat([prefix + positions_BW] * len(scales))
        if leaves:
            scratch_W = torch.arange(leaves, device=at_RW.device) + prefix + self.request.length
            slots_RW = torch.cat([at_RW[:, :-leaves], scratch_W.expand(at_RW.shape[0], -1)], dim=1)
        if stop is not None:
            self._cache.limit(min(prefix + stop, prefix + self.request.length))
        self.forward_passes += 1
        x_RWD = self._backbone.embed(torch.cat([codes_BW] * len(scales)), at_RW)
        logits_RWV = self._backbone.predict(x_RWD, slots_RW, self._cache, self._inject(tokens_BW, scales),
                                            at_RW if leaves else None)
        return self._guided(logits_RWV, tokens_BW, scales)

    def _inject(self, tokens_BW: Tensor, branches: Collection[str]) -> Tensor | None:
        """inject_KRWD for the passes of these branches that predict these tokens."""
        if self._inject_KBND is None:
            return None
        rows_B1 = torch.arange(tokens_BW.shape[0], device=tokens_BW.device)[:, None]
        return branch_inject(self._inject_KBND[:, rows_B1, tokens_BW], branches)

    def _guided(self, logits_RWV: Tensor, tokens_BW: Tensor, scales: dict[str, float]) -> Tensor:
        """guided_BWV for the tokens that the passes predict, each with its share of guidance."""
        logits_GBWV = at_least_float32(logits_RWV).unflatten(0, (len(scales), -1))
        full_BWV = guided_BWV = logits_GBWV[0]
        if len(scales) > 1:
            guided_BWV = self._shared(mix(logits_GBWV, scales), full_BWV, tokens_BW)
        return bar_implausible(guided_BWV, full_BWV, self.request.guidance.plausibility)

    def _shared(self, guided_BWV: Tensor, full_BWV: Tensor, tokens_BW: Tensor) -> Tensor:
        """full + r (guided - full), r each token's share of guidance."""
        first, stop = self.request.guidance.interval
        if self._by_scale:
            guided_BWV = full_BWV.lerp(guided_BWV, self._ramp(tokens_BW).to(guided_BWV.dtype)[..., None])
        if (first, stop) == (0, None):
            return guided_BWV
        inside_BW = tokens_BW >= first
        if stop is not None:
            inside_BW = inside_BW & (tokens_BW < stop)
        return torch.where(inside_BW[..., None], guided_BWV, full_BWV)

    def _ramp(self, tokens_BW: Tensor) -> Tensor:
        """k / (S - 1) of each token's scale k, float32; 0 where there is one scale."""
        sizes_S = torch.tensor([height * width for height, width in self.request.scales], device=tokens_BW.device)
        scales_BW = torch.bucketize(tokens_BW.contiguous(), sizes_S.cumsum(0), right=True)
        return scales_BW / max(1, len(sizes_S) - 1)

    def _probs(self, logits_BWV: Tensor) -> Tensor:
        return filter_probs(logits_BWV, self.request.sampling, from_below=self._by_scale)
