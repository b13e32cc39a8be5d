"""The autoregressive transformer with its layers on another runtime: a Backbone, so that every decoder serves it.

Embeddings are looked up here; layers, final norm and head are one graph (graphs.step_graph), so `step` returns logits
already and `logits` hands them through.
"""

from __future__ import annotations

from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from arimg.backends.cache import HandedCache, Pass, PlaceCache, SlotCache, new_slot_cache
from arimg.backends.host import Exported
from arimg.backends.runtimes import OnnxGraph
from arimg.models.ar import ARConfig, CaptionEmbedding, ClassEmbedding, rotary_table
from arimg.models.base import Backbone, Condition


def cache_names(layers: int) -> list[str]:
    """Of the graph's inputs, in the order of a cache's store."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


class ExportedTransformer(Exported, Backbone):
    """See models/base.py for the contract; subclasses name the runtime and its kind of cache."""

    graph_name = "step"
    cache_kind: ClassVar[type[SlotCache]]

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.prefix_length = config.prefix_length
        self.inject_points = len(config.inject_layers)
        embedding = ClassEmbedding if config.conditioning == "class" else CaptionEmbedding
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)       # a tied codebook's part included

    def open_graph(self, folder: Path, dtype: torch.dtype | None) -> None:
        """See Exported."""
        super().open_graph(folder, dtype)
        self.__dict__.pop("exact", None)

    @cached_property
    def exact(self) -> bool:
        """Whether a pass over many positions gives the laws of passes over one each. With rounded activations that
        needs sums of one order, bit by bit, which depends on the processor's kernels: so it is tried."""
        return self._graph is None or not self._graph.rounds or all(map(self._equal_passes, (1, 2, 3)))

    @torch.no_grad()
    def _equal_passes(self, rows: int) -> bool:
        """At the end of the largest square and a full cache, whose values are random."""
        side, random = isqrt(self.config.block_size), torch.Generator().manual_seed(0)
        stop, width = self.prefix_length + side ** 2, min(8, side ** 2)
        cache = self.new_cache(rows, stop, (side, side))
        cache.hold(stop)
        cache.store_NRGSE.normal_(generator=random)
        cache.written_RS[:, :stop - width] = True
        slots_RW = torch.arange(stop - width, stop).expand(rows, -1)
        x_RWD = torch.randn(rows, width, self.config.dim, generator=random)
        together = self.step(x_RWD, slots_RW, cache)
        alone = [self.step(x_RWD[:, k:k + 1], slots_RW[:, k:k + 1], cache) for k in range(width)]
        return torch.equal(torch.cat(alone, dim=1), together)

    def null(self, condition: Condition) -> Condition:
        """The unconditional twin."""
        return self.cls_embedding.drop(condition, torch.ones(condition.rows, dtype=torch.bool))

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> SlotCache:
        """See Backbone; gradients there are none. Raises InputError when the grid is too large."""
        assert store, "an exported network is not trained"
        config = self.config
        rope_SF2 = rotary_table(config, grid)[:length]
        return new_slot_cache(self.cache_kind, rope_SF2, config.layers, rows, config.key_heads, config.head_dim,
                              scratch, prefix_mask_RP)

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD."""
        return self.cls_embedding(condition)

    def embed(self, codes_RW: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD."""
        return self.tok_embeddings(codes_RW)

    @torch.no_grad()
    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """logits_RWV; see Backbone.step."""
        rows, width = slots_RW.shape
        one = cache.open(slots_RW, mask_RWW, at_RW)
        inputs = {"x": x_RWD, "cos": one.turn_RWF2[..., 0], "sin": one.turn_RWF2[..., 1], "bias": one.bias}
        if inject_KRWD is None:
            inject_KRWD = x_RWD.new_zeros(self.inject_points, 1, 1, 1).expand(-1, rows, width, self.config.dim)
        inputs |= {f"inject_{k}": inject_KRWD[k].float() for k in range(self.inject_points)}
        return self.layers(inputs, one, slots_RW, cache)

    def layers(self, inputs: dict[str, Tensor], one: Pass, slots_RW: Tensor, cache: Any) -> Tensor:
        """logits_RWV of the graph, and the pass in the cache."""
        raise NotImplementedError

    def logits(self, h_RWV: Tensor) -> Tensor:
        """What `step` returned."""
        return h_RWV


class OnnxTransformer(ExportedTransformer):
    """On ONNX Runtime."""

    runtime = "onnx"
    cache_kind = PlaceCache

    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: PlaceCache, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """See ExportedTransformer. Products take rows in pairs, and a row that is left over has a kernel of its own,
        with other sums: where activations are rounded and one would be left, the last position is there twice."""
        if slots_RW.numel() % 2 == 0 or not self.graph.rounds:
            return super().step(x_RWD, slots_RW, cache, inject_KRWD, mask_RWW, at_RW)
        width = slots_RW.shape[1]
        twice = torch.arange(width + 1).clamp_(max=width - 1)
        inject_KRWD = None if inject_KRWD is None else inject_KRWD[:, :, twice]
        mask_RWW = None if mask_RWW is None else mask_RWW[:, twice][:, :, twice]
        at_RW = None if at_RW is None else at_RW[:, twice]
        return super().step(x_RWD[:, twice], slots_RW[:, twice], cache, inject_KRWD, mask_RWW, at_RW)[:, :width]

    def layers(self, inputs: dict[str, Tensor], one: Pass, slots_RW: Tensor, cache: PlaceCache) -> Tensor:
        """See ExportedTransformer."""
        (rows, width), groups = slots_RW.shape, self.config.key_heads
        places = (torch.arange(rows)[:, None, None], torch.zeros(1, dtype=torch.int64), torch.arange(groups),
                  slots_RW[..., None])
        inputs["where"] = torch.stack(torch.broadcast_tensors(*places), dim=-1)
        if cache.bound is None or not cache.bound.holds(one.past):
            graph = cast(OnnxGraph, self.graph)
            cache.bound = graph.bind(cache_names(self.config.layers), one.past)
        return cache.bound(inputs, "logits", (rows, width, self.vocab_size))


class OpenvinoTransformer(ExportedTransformer):
    """On OpenVINO."""

    runtime = "openvino"
    cache_kind = HandedCache

    def layers(self, inputs: dict[str, Tensor], one: Pass, slots_RW: Tensor, cache: HandedCache) -> Tensor:
        """See ExportedTransformer."""
        inputs["cut"] = torch.tensor([one.past.shape[3], slots_RW.shape[1]])
        inputs |= dict(zip(cache_names(self.config.layers), one.past))
        fresh, logits_RWV = self.graph(inputs)
        cache.write(slots_RW, fresh)
        return logits_RWV
