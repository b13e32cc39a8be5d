"""Next-scale decoding of VAR (Tian et al. 2024, arXiv:2404.02905): one pass per scale, whose tokens are drawn at once.

The law of scale k given the coarser ones is a product over its tokens, so that the draws below are exact: this is the
plain decoder of models whose order is "scales". What a pass reads is the map that the coarser scales add up to, and
vectors that are in no codebook add up as well as those that are.

Letters: B images; L tokens of all S scales in one row; W tokens of a scale; C latent channels; V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.target import Target
from arimg.errors import InputError
from arimg.models.base import Order
from arimg.tokenizers.base import ScaleSpace, TokenSpace


def scale_ends(scales: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """S+1 numbers: how many tokens the first k scales hold."""
    return tuple(accumulate((height * width for height, width in scales), initial=0))


def scale_space(space: TokenSpace | None) -> ScaleSpace:
    """`space` as that of a tokenizer with several scales. Raises InputError when it has one."""
    if space is None or space.scales is None:
        raise InputError("the model predicts scale by scale, and the tokenizer has one scale; use a tokenizer of VAR's "
                         "kind, or another decoder")
    return cast(ScaleSpace, space)


def scale_inputs(latents_BLC: Tensor, space: TokenSpace | None) -> Tensor:
    """cells_BNC, N = L minus the tokens of the first scale: what the slots after those read of token vectors.

    Raises InputError as `scale_space`.
    """
    space, map_BChw, cells = scale_space(space), None, [latents_BLC[:, :0]]
    for k, (start, stop) in enumerate(pairwise(scale_ends(space.scales))):
        if map_BChw is not None:
            cells.append(space.next_input(map_BChw, k))
        map_BChw = space.accumulate(map_BChw, latents_BLC[:, start:stop], k)
    return torch.cat(cells, dim=1)


def latent_map(latents_BLC: Tensor, grid: tuple[int, int], space: TokenSpace | None) -> Tensor:
    """The map (B, C, h, w) that the tokenizer's decoder reads, of token vectors in raster order, or of all scales."""
    if space is None or space.scales is None:
        return latents_BLC.unflatten(1, grid).movedim(-1, 1)
    space, map_BChw = scale_space(space), None
    for k, (start, stop) in enumerate(pairwise(scale_ends(space.scales))):
        map_BChw = space.accumulate(map_BChw, latents_BLC[:, start:stop], k)
    assert map_BChw is not None
    return map_BChw


def scale_laws(target: Target, space: TokenSpace, latents_BLC: Tensor, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yields (k, p_BWV), the laws of scale k's tokens, for k = first, first+1, ...

    The vectors of the scales before `first` are known: one block-causal pass reads them all. Those of a scale that was
    yielded must be in `latents_BLC` before the next one is asked for. Raises InputError as `scale_space`.
    """
    space, p_BWV, map_BChw, unread = scale_space(space), target.start(), None, list[Tensor]()
    for k, (start, stop) in enumerate(pairwise(scale_ends(space.scales))):
        if map_BChw is not None:
            unread.append(space.next_input(map_BChw, k))
        if k >= first:
            if unread:
                cells_BWC = torch.cat(unread, dim=1)
                p_BWV = target.read(cells_BWC, stop - cells_BWC.shape[1])[:, start - stop:]
            unread.clear()
            yield k, p_BWV
        map_BChw = space.accumulate(map_BChw, latents_BLC[:, start:stop], k)


class ScaleByScale:
    """Token j of an image is argmax(log p_j + Gumbel(seed, j)), whatever else is in the batch."""

    guarantee: Guarantee = "same-codes"
    order: Order = "scales"

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64), all scales. Forced codes (>= 0) replace the drawn ones; leading scales that are forced in
        every image take no passes of their own. Raises InputError when the tokenizer has no scales."""
        space, ends, batch = scale_space(request.space), scale_ends(request.scales), len(request.seeds_B)
        positions_BL = torch.arange(ends[-1], device=request.seeds_B.device).expand(batch, -1)
        forced_BL = torch.full_like(positions_BL, -1) if request.forced_BL is None else request.forced_BL
        codes_BL = forced_BL.clamp_min(0)
        latents_BLC, drawn = space.codebook_VC[codes_BL], []
        for k, p_BWV in scale_laws(target, space, latents_BLC, first=_known_scales(forced_BL, ends)):
            here = slice(ends[k], ends[k + 1])
            codes_BW = target.draw(p_BWV, positions_BL[:, here])
            free_BW = forced_BL[:, here] < 0
            codes_BL[:, here] = torch.where(free_BW, codes_BW, forced_BL[:, here])
            vectors_BWC = self.vectors(p_BWV, codes_BL[:, here], positions_BL[:, here], k, target.request)
            latents_BLC[:, here] = torch.where(free_BW[..., None], vectors_BWC, latents_BLC[:, here])
            drawn.append(float(ends[k + 1] - ends[k]))
            if on_step is not None:
                on_step(StepInfo(target.forward_passes, ends[k + 1] * batch, ends[-1] * batch, codes_BL))
        return self.result(DecodeStats(target.forward_passes, tuple(drawn)), codes_BL, latents_BLC)

    def vectors(self, p_BWV: Tensor, codes_BW: Tensor, positions_BW: Tensor, k: int, request: DecodeRequest) -> Tensor:
        """vectors_BWC that stand for the tokens drawn on scale k: the code vectors."""
        assert request.space is not None
        return request.space.codebook_VC[codes_BW]

    def result(self, stats: DecodeStats, codes_BL: Tensor, latents_BLC: Tensor) -> DecodeResult:
        """What the picture is painted from: the codes."""
        return DecodeResult(stats, codes_BL)


class SmoothScales(ScaleByScale):
    """The release's `more_smooth`: the vectors of a soft choice (Gumbel softmax, Jang et al. 2017), harder on finer
    scales, in place of code vectors. Smoother pictures, another law; not for FID."""

    guarantee: Guarantee = "none"

    def vectors(self, p_BWV: Tensor, codes_BW: Tensor, positions_BW: Tensor, k: int, request: DecodeRequest) -> Tensor:
        """softmax(((1 + r) log p + Gumbel) / tau) C, r = k / (S - 1), tau = max(0.27 (1 - 0.95 r), 0.005)."""
        assert request.space is not None
        share = k / max(1, len(request.scales) - 1)
        noise_BWV = request.noise.gumbel(request.seeds_B, positions_BW, p_BWV.shape[-1])
        tau = max(0.27 * (1 - 0.95 * share), 0.005)
        weights_BWV = F.softmax(((1 + share) * p_BWV.log() + noise_BWV) / tau, dim=-1)
        return weights_BWV.to(request.space.codebook_VC.dtype) @ request.space.codebook_VC

    def result(self, stats: DecodeStats, codes_BL: Tensor, latents_BLC: Tensor) -> DecodeResult:
        """The vectors, and beside them the codes that plain sampling would have taken."""
        return DecodeResult(stats, codes_BL, latents_BLC)


def _known_scales(forced_BL: Tensor, ends: Sequence[int]) -> int:
    """How many leading scales are forced in every image."""
    known_L = (forced_BL >= 0).all(0).tolist()
    return next((k for k, (start, stop) in enumerate(pairwise(ends)) if not all(known_L[start:stop])), len(ends) - 1)
