"""Objective `control`: the AR transformer and its control adapter together (ControlAR section 3.2), from the start or
from the weights of an `ar` run.

Each sample is a picture's codes, its class, and a random map of the picture (train/maps.py) of a random type.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.data import to_images
from arimg.errors import ConfigError, UnknownNameError
from arimg.train.ar import ARObjective, ARRun, ARTask
from arimg.train.maps import check_types, random_map


@dataclass(frozen=True)
class ControlRun(ARRun):
    """A joint run of model and control adapter."""

    control: ControlConfig = field(default_factory=ControlConfig)
    type_weights: dict[str, float] = field(default_factory=dict)    # how often a type is drawn; those not named: 1
    control_dropout: float = 0.1            # share of samples without control, besides the model's class_dropout

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self.control.types)
        for name, weight in self.type_weights.items():
            if name not in self.control.types:
                raise UnknownNameError("type in type_weights", name, self.control.types)
            if not 0 < weight < float("inf"):
                raise ConfigError(f"type_weights.{name}={weight}: must be positive; to train without a type, leave it "
                                  "out of control.types")
        if self.control.dim != self.model.dim:
            raise ConfigError(f"control.dim={self.control.dim}: feeds a model of dim {self.model.dim}; make them equal")
        if self.control.points != len(self.model.inject_layers):
            raise ConfigError(f"control.points={self.control.points}: model.inject_layers has "
                              f"{len(self.model.inject_layers)} layers; one point feeds one layer")

    def type_shares(self) -> np.ndarray:
        """Probability of each of `control.types`."""
        weights = np.array([self.type_weights.get(name, 1.0) for name in self.control.types])
        return weights / weights.sum()


class ControlTask(ARTask):
    """Cross entropy with control; dropped controls add zero."""

    def __init__(self, config: ControlRun, codebook_VC: Tensor, grid: tuple[int, int]) -> None:
        super().__init__(config, codebook_VC, grid)
        self.control = ControlAdapter(config.control)

    def inject(self, *control: Tensor) -> Tensor:
        """inject_KBLD of (maps, type ids, keep control)."""
        maps_B3HW, type_ids_B, keep_control_B = control
        return self.control.inject(maps_B3HW, type_ids_B=type_ids_B) * keep_control_B[:, None, None]


class ControlObjective(ARObjective):
    """Train on an emoji folder with maps made on the fly."""

    config_class = ControlRun
    task_class = ControlTask

    def maps(self, indices: np.ndarray, type_ids_B: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Random maps (B, 3, H, W) in [-1, 1]."""
        types = [self.config.control.types[i] for i in type_ids_B]
        maps = [random_map(name, pixels, rng) for name, pixels in zip(types, self.cache.pixels(indices))]
        return to_images(np.stack(maps))

    def draw_control(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """(maps, type ids, keep control): types drawn with their shares."""
        shares = self.config.type_shares()
        type_ids_B = rng.choice(len(shares), len(indices), p=shares)
        keep_control_B = torch.from_numpy(rng.random(len(indices)) >= self.config.control_dropout)
        return self.maps(indices, type_ids_B, rng), torch.from_numpy(type_ids_B), keep_control_B

    def held_out_control(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """The same maps every time, types in rotation, all kept."""
        type_ids_B = np.arange(len(indices)) % len(self.config.control.types)
        maps_B3HW = self.maps(indices, type_ids_B, np.random.default_rng([self.config.seed, 3]))
        return maps_B3HW, torch.from_numpy(type_ids_B), torch.ones(len(indices), dtype=torch.bool)

    def control_types(self) -> tuple[str, ...]:
        """Those that the adapter is trained on."""
        return self.config.control.types
