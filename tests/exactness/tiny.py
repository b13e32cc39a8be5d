"""Decoding problems so small that the law of their codes can be written down: random tables instead of a network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.models.base import Backbone, Condition

CLASSES = 3
NOTHING = -1        # in a cache: this slot has not been written


@dataclass
class TableCache:
    """The codes that were read, by slot; slot 0 holds the class."""

    codes_RS: Tensor
    stop: int

    def limit(self, stop: int) -> None:
        """See KVCache."""
        self.stop = stop


class TableNet(Backbone):
    """A Backbone whose logits at a position are a row of a random table, one row for each sequence of visible codes.

    It refuses what base.py forbids: to read a slot that was never written, and to touch one beyond the limit.
    """

    prefix_length = 1
    inject_points = 1

    def __init__(self, vocab: int, length: int, seed: int) -> None:
        self.vocab_size, self.length = vocab, length
        prefixes = vocab ** (length - 1)
        generator = torch.Generator().manual_seed(seed)
        shape = (CLASSES + 1, length, prefixes, vocab)
        self.table_CLPV = 1.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.control_LPV = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
        self.radix_L = vocab ** torch.arange(length)
        self.cache = TableCache(torch.empty(0), 0)      # the last one made

    def null(self, condition: Condition) -> Condition:
        """Class CLASSES stands for no class."""
        assert condition.class_ids_B is not None
        return Condition(class_ids_B=torch.full_like(condition.class_ids_B, CLASSES))

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> TableCache:
        """See Backbone."""
        assert grid[0] * grid[1] == self.length == length - 1 and prefix_mask_RP is None and store
        self.cache = TableCache(torch.full((rows, length + scratch), NOTHING), length)
        return self.cache

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD: the class."""
        assert condition.class_ids_B is not None
        return condition.class_ids_B[:, None, None].double()

    def embed(self, codes_RW: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD: the code."""
        assert bool((codes_RW >= 0).all() and (codes_RW < self.vocab_size).all())
        return codes_RW[..., None].double()

    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: TableCache, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """h_RWD: the logits. See Backbone."""
        assert mask_RWW is None
        rows, read_RW = x_RWD.shape[0], x_RWD[..., 0].long()
        at_RW = slots_RW if at_RW is None else at_RW
        codes_RS = cache.codes_RS[:rows]
        codes_RS.scatter_(1, slots_RW, read_RW)
        scratch_RW = slots_RW > self.length
        assert bool(((slots_RW < cache.stop) | scratch_RW).all()), "a slot at or beyond the limit"
        slots_L = torch.arange(1, 1 + self.length)
        before_RWL, here_RWL = slots_L < at_RW[..., None], slots_L == at_RW[..., None]
        judged_RW1 = (at_RW < self.length)[..., None]           # the last slot predicts nothing
        seen_RWL = codes_RS[:, None, 1:1 + self.length].expand(-1, at_RW.shape[1], -1)
        assert not bool((before_RWL & judged_RW1 & (seen_RWL == NOTHING)).any()), "a slot that was never written"
        seen_RWL = torch.where(before_RWL & judged_RW1, seen_RWL, 0) + read_RW[..., None] * (here_RWL & judged_RW1)
        prefixes_RW = (seen_RWL * self.radix_L).sum(-1)
        tokens_RW = torch.where(judged_RW1[..., 0], at_RW, 0)
        logits_RWV = self.table_CLPV[codes_RS[:, :1], tokens_RW, prefixes_RW]
        if inject_KRWD is not None:
            logits_RWV = logits_RWV + inject_KRWD[0] * self.control_LPV[tokens_RW, prefixes_RW]
        return logits_RWV

    def logits(self, h_RWD: Tensor) -> Tensor:
        """logits_RWV."""
        return h_RWD


@dataclass(frozen=True)
class Case:
    """A problem: one image for each of `classes`."""

    vocab: int = 2
    grid: tuple[int, int] = (1, 3)
    classes: tuple[int, ...] = (0,)
    guidance: Guidance = Guidance()
    sampling: Sampling = Sampling()
    controlled: bool = False
    forced: tuple[tuple[int, ...], ...] | None = None       # per image; -1 = free
    drafts: tuple[tuple[int, ...], ...] | None = None       # per image; -1 = none
    seed: int = 0
    space: Any = field(default=None, compare=False)

    @property
    def length(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def net(self) -> TableNet:
        """The tables."""
        return TableNet(self.vocab, self.length, self.seed)

    @cached_property
    def strength_BL(self) -> Tensor:
        """How much each token of each image is under control."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(len(self.classes), self.length, generator=generator, dtype=torch.float64) + 0.5

    def request(self, images_R: Tensor, noise: Any) -> DecodeRequest:
        """A batch of any of the images; seed r belongs to row r."""
        forced, drafts = (None if codes is None else torch.tensor(codes)[images_R]
                          for codes in (self.forced, self.drafts))
        return DecodeRequest(
            Condition(class_ids_B=torch.tensor(self.classes)[images_R]), self.grid, torch.arange(len(images_R)),
            self.strength_BL[images_R][None, ..., None] if self.controlled else None, self.guidance, self.sampling,
            self.space, forced, drafts, noise=noise)

    def law(self, image: int, prefix: tuple[int, ...]) -> Tensor:
        """p_V of the next code, straight from the tables and the formulas."""
        token, guidance = len(prefix), self.guidance
        if self.forced is not None and self.forced[image][token] >= 0:
            return torch.eye(self.vocab, dtype=torch.float64)[self.forced[image][token]]
        row = sum(code * self.vocab ** i for i, code in enumerate(prefix))
        plain_V, null_V = (self.net.table_CLPV[c, token, row] for c in (self.classes[image], CLASSES))
        full_V = plain_V
        if self.controlled:
            full_V = plain_V + self.strength_BL[image, token] * self.net.control_LPV[token, row]
        w_full = guidance.cfg if guidance.control_cfg is None or not self.controlled else guidance.control_cfg
        first, stop = guidance.interval
        guided_V = full_V
        if first <= token < (self.length if stop is None else stop):
            if guidance.order == "class-first":
                guided_V = w_full * full_V + (guidance.cfg - w_full) * plain_V + (1 - guidance.cfg) * null_V
            else:
                map_V = null_V + full_V - plain_V
                guided_V = guidance.cfg * full_V + (w_full - guidance.cfg) * map_V + (1 - w_full) * null_V
        if guidance.plausibility:
            unlikely_V = full_V.softmax(0) < guidance.plausibility * full_V.softmax(0).max()
            guided_V = guided_V.masked_fill(unlikely_V, float("-inf"))
        return _filtered(guided_V, self.sampling)

    def pieces(self, codes: tuple[int, ...]) -> list[tuple[float, float]]:
        """For each code of the first image, given those before it: its piece of the cumulated law."""
        laws = [self.law(0, codes[:token]).cumsum(0).tolist() for token in range(len(codes))]
        return [(upper[code - 1] if code else 0.0, upper[code]) for code, upper in zip(codes, laws)]

    @cached_property
    def chain_law(self) -> Tensor:
        """The law of all codes of all images, by the chain rule; images are independent. Flat, first code slowest."""
        joint = torch.ones(1, dtype=torch.float64)
        for image in range(len(self.classes)):
            own = torch.ones(1, dtype=torch.float64)
            for token in range(self.length):
                prefixes = itertools.product(range(self.vocab), repeat=token)
                own = (own[:, None] * torch.stack([self.law(image, prefix) for prefix in prefixes])).flatten()
            joint = (joint[:, None] * own).flatten()
        return joint


def _filtered(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k and top-p, one code at a time."""
    if sampling.temperature == 0:
        return torch.eye(len(logits_V), dtype=torch.float64)[int(logits_V.argmax())]
    weights = (logits_V / sampling.temperature).exp().tolist()
    ranked = sorted(range(len(weights)), key=lambda code: -weights[code])[:sampling.top_k or len(weights)]
    total, held, kept = sum(weights[code] for code in ranked), 0.0, list[int]()
    for code in ranked:
        if held > sampling.top_p * total:
            break
        kept.append(code)
        held += weights[code]
    return torch.tensor([weights[code] / held if code in kept else 0.0 for code in range(len(weights))],
                        dtype=torch.float64)
