"""What can be trained: the contract between the loop and its objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from arimg.train.run import AdamWConfig

Batch = tuple[Tensor, ...]
Losses = dict[str, Tensor]
Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Player:
    """A network with an optimiser of its own."""

    network: nn.Module
    optim: AdamWConfig
    updates: int                # how many its schedule is made for
    averaged: bool = True       # whether an average of its weights is kept
    renewed_at: int = 0         # steps after which its weights become that average, once; 0 = never


class Objective(Protocol):
    """What is trained, on which batches, and what there is to show for it.

    A network of equal blocks has them in `layers` and takes `checkpoint_blocks = True`: then its backward pass computes
    them again. Such networks can also be sharded. `no_decay` of a player's network names parameters without decay.
    """

    def players(self) -> dict[str, Player]:
        """The networks by name. The first is the one that is sampled, validated and exported."""

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` of a step: a function of (seed, step, micro) alone, whoever asks for it."""

    def losses(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> tuple[Losses, Figures]:
        """Scalar loss of every player whose turn it is at this step; the others rest. Figures without dimensions are
        averaged over the micro-batches and logged; others are joined along the first one for `after_step`.

        `networks` go through the machinery of several processes: each may be called once. A player that only judges
        is called by its own module, its parameters frozen.
        """

    def after_step(self, step: int, network: nn.Module, seen: Figures) -> dict[str, float]:
        """Work outside the gradient on the first network, the same on every process, such as dead-code revival;
        returns figures to log. `step` steps are done."""

    def state_dict(self) -> dict[str, Any]:
        """What `after_step` remembers between steps: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""

    def validation_loss(self, network: nn.Module) -> float:
        """The first network's loss on held-out data, always the same."""

    def sample(self, network: nn.Module) -> Image.Image:
        """A picture of how far the run is: same seeds and controls every time."""

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained parts as a checkpoint folder."""


class SingleNetwork:
    """The part of an objective that is the same for all that train one network with forward(*batch) -> loss, figures
    and do nothing outside the gradient."""

    config: Any         # a RunConfig of the objective
    network: Any        # an nn.Module of the objective

    def players(self) -> dict[str, Player]:
        """The network."""
        return {"network": Player(self.network, self.config.optim, self.config.optim.steps)}

    def losses(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> tuple[Losses, Figures]:
        """Its loss and figures."""
        loss, figures = networks["network"](*batch)
        return {"network": loss}, figures

    def after_step(self, step: int, network: nn.Module, seen: Figures) -> dict[str, float]:
        """Nothing outside the gradient."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
