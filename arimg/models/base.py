"""The contract between a network and a decoder.

Letters: B images; R rows (images x guidance branches); P prefix slots; L tokens; W positions in one pass; K injection
points; V codes; D width. A *slot* is a place in the sequence a backbone reads: the prefix has slots 0 .. P-1, token i
is read at slot P+i, and the output at slot P-1+j predicts token j.

The above is the raster order. In the order of *scales* (models/var.py) slot j predicts token j of all scales in one
row: the prefix has one slot for each token of the first scale, and the other slots read cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Order = Literal["raster", "scales", "continuous"]


def order_of(part: Any) -> Order:
    """The order in which a network predicts tokens or a decoder paints them: attribute `order`, "raster" if none."""
    order: Order = getattr(part, "order", "raster")
    return order


@dataclass(frozen=True)
class Condition:
    """What a picture is of: class ids, or caption features with their mask. One of the two is set."""

    class_ids_B: Tensor | None = None           # int64
    caption_BPC: Tensor | None = None           # text features, left-padded
    caption_mask_BP: Tensor | None = None       # bool, True on real caption slots; None = all real

    @property
    def rows(self) -> int:
        """Number of images."""
        tensor = self.class_ids_B if self.class_ids_B is not None else self.caption_BPC
        assert tensor is not None, "a Condition holds class ids or a caption"
        return tensor.shape[0]

    @staticmethod
    def cat(parts: Sequence["Condition"]) -> "Condition":
        """Rows of all parts, one after the other."""
        def join(tensors: list[Tensor | None]) -> Tensor | None:
            found = [tensor for tensor in tensors if tensor is not None]
            assert len(found) in (0, len(tensors)), (len(found), len(tensors))
            return torch.cat(found) if found else None
        return Condition(join([part.class_ids_B for part in parts]), join([part.caption_BPC for part in parts]),
                         join([part.caption_mask_BP for part in parts]))


class KVCache(Protocol):
    """What a decoder may ask of a cache; all else in it is the network's own affair."""

    def limit(self, stop: int) -> None:
        """The host's promise for the passes to come: none reads or writes a slot at or beyond `stop`, scratch apart. A
        network may use it to read less, or ignore it."""


class Backbone(Protocol):
    """What a decoder may ask of a network. Implementations hold no run state: all of it lives in the cache."""

    vocab_size: int         # V
    prefix_length: int      # P
    inject_points: int      # K; 0 when the network takes no control

    def null(self, condition: Condition) -> Condition:
        """The unconditional twin: null class, or the stored null caption under the same mask."""

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> Any:
        """A KVCache of `length` slots (prefix included) for images of `grid` = (h, w) tokens, and `scratch` slots more
        behind them. `store=False` is for training: one differentiable pass over slots 0 .. W-1."""

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD: class or caption rows."""

    def embed(self, units_RW: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD: what the network reads at these slots, for codes_RW or, in the order of scales, cells latents_RWC."""

    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """h_RWD. Writes keys and values by slot, so a later write to the same slot replaces it: no rollback. A query at
        slot s sees every written slot < s and itself; `mask_RWW` (bool), when given, replaces that rule inside the
        pass. A pass of fewer rows than the cache holds concerns its first rows. Slots are filled without gaps, unless
        the cache has been told a limit. An entry at a scratch slot takes the position of slot `at` (None = its own) and
        is seen by itself alone."""

    def logits(self, h_RWD: Tensor) -> Tensor:
        """logits_RWV."""

    def predict(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None,
                at_RW: Tensor | None = None) -> Tensor:
        """logits_RWV of a pass: `step` and `logits`, which a network may do in one."""
        return self.logits(self.step(x_RWD, slots_RW, cache, inject_KRWD, at_RW=at_RW))


class MaskedBackbone(Protocol):
    """What a decoder may ask of a network that reads any set of known tokens (MAR). It holds no run state."""

    channels: int           # C of a token
    head: "Head"
    inject_points: int

    def null(self, condition: Condition) -> Condition:
        """The unconditional twin."""

    def context(self, condition: Condition, latents_RLC: Tensor, known_RL: Tensor,
                inject_KRLD: Tensor | None = None) -> Tensor:
        """z_RLD for every token, given those where the bool `known_RL` is true; the others are not read. Rows may know
        different numbers of tokens. inject_KRLD may have fewer rows than the others: it concerns the first ones."""


@dataclass(frozen=True)
class HeadSample:
    """Continuous tokens and the Gaussian of the head's last step, in float32 at least. N tokens of C channels."""

    latents_NC: Tensor
    mean_NC: Tensor
    std_NC: Tensor              # temperature included; 0 where the sampler has no density
    earlier_log_std_NC: Tensor  # sum over all steps before the last of log std, without temperature


class Head(Protocol):
    """What a decoder may ask of the head that draws continuous tokens from z. It holds no run state."""

    channels: int               # C
    evaluations: int            # of its network, for one token
    draws: int                  # S: noise_NSC[:, 0] is the start, [:, 1 + i] belongs to the i-th step before the end
    has_density: bool           # whether the last step has a Gaussian, so that `last_noise` and p/q rules make sense

    def sample(self, z_GND: Tensor, noise_NSC: Tensor, scales_GN: Tensor | None = None, temperature: float = 1.0,
               last_noise: bool = False) -> HeadSample:
        """Tokens from standard normal noise.

        Guidance over the branches: guided = branch G-1, then for g = G-2 .. 0 guided += scales_GN[g] * (branch g -
        branch g+1). The variance is that of branch 0. `last_noise` adds the noise of the last step, which MAR leaves
        out.
        """

    def training_loss(self, target_NC: Tensor, z_ND: Tensor, t_N: Tensor, noise_NC: Tensor) -> Tensor:
        """loss_N of clean tokens at times t_N, uniform in [0, 1)."""
