"""Objective `control`: the AR transformer and its control adapter together (ControlAR section 3.2), from the start or
from the weights of an `ar` run.

Each sample is a picture's codes, its class or caption, and a map of the picture of one of the types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.control.base import get_type
from arimg.data import to_images
from arimg.errors import ConfigError, UnknownNameError
from arimg.interop.controlar import encoder_state
from arimg.train.ar import ARObjective, ARRun, ARTask, check_shares
from arimg.train.crops import Crop
from arimg.train.data import Example, MapSource
from arimg.train.growth import deepened
from arimg.train.map_sources import KINDS, CachedMaps, ExtractedMaps, RandomMaps, maps_cache
from arimg.train.maps import check_types
from arimg.train.sources import Source
from arimg.weights import read_weights


@dataclass(frozen=True)
class ControlRun(ARRun):
    """A joint run of model and control adapter."""

    control: ControlConfig = field(default_factory=ControlConfig)
    maps: str = "random"                    # random (maps.py) | extracted (as published) | cached (arimg data maps)
    type_weights: dict[str, float] = field(default_factory=dict)    # how often a type is drawn; those not named: 1
    control_dropout: float = 0.1            # share of samples without control, besides the model's class_dropout
    drop_together: float = 0.0              # share of dropped classes or captions that drop the control (ControlAR: 1)
    encoder_weights: str = ""               # Hugging Face file of the ViT or DINOv2 that the encoder starts from
    new_layers: tuple[int, ...] = ()        # those of the model that init_from lacks: they start as the identity
    new_control_layers: tuple[int, ...] = ()    # those of the control encoder, likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(control_dropout=self.control_dropout, drop_together=self.drop_together)
        if self.maps not in KINDS:
            raise UnknownNameError("maps", self.maps, KINDS)
        if self.maps == "random":
            check_types(self.control.types)
        if (self.new_layers or self.new_control_layers) and not self.init_from:
            raise ConfigError("new_layers, new_control_layers: grow a trained network; give its folder, "
                              "init_from=FOLDER, or leave them out")
        self._check_resampling()
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

    def _check_resampling(self) -> None:
        """An encoder that scales its maps treats all of a batch alike."""
        ways = {get_type(name).resample for name in self.control.types}
        if self.control.patch != self.control.stride and len(ways) > 1:
            raise ConfigError(f"control.types={list(self.control.types)}: this encoder scales maps, and these types "
                              "are scaled in different ways; train them in runs of their own")

    def type_shares(self) -> np.ndarray:
        """Probability of each of `control.types`."""
        weights = np.array([self.type_weights.get(name, 1.0) for name in self.control.types])
        return weights / weights.sum()


class ControlTask(ARTask):
    """Cross entropy with control; dropped controls add zero."""

    def __init__(self, config: ControlRun, codebook_VC: Tensor, grid: tuple[int, int]) -> None:
        super().__init__(config, codebook_VC, grid)
        self.control = ControlAdapter(config.control)
        self.resample = get_type(config.control.types[0]).resample

    def grid_of(self, *control: Tensor) -> tuple[int, int]:
        """(h, w) tokens: those of the maps."""
        stride = self.control.config.stride
        return control[0].shape[2] // stride, control[0].shape[3] // stride

    def inject(self, *control: Tensor) -> Tensor:
        """inject_KBLD of (maps, type ids, keep control)."""
        maps_B3HW, type_ids_B, keep_control_B = control
        inject_KBLD = self.control.inject(maps_B3HW, self.resample, type_ids_B, self.scales())
        return inject_KBLD * keep_control_B[:, None, None]

    def scales(self) -> tuple[tuple[int, int], ...] | None:
        """Those of the model; None: a raster."""
        return None


class ControlObjective(ARObjective):
    """Train on any source with control maps."""

    config_class = ControlRun
    task_class = ControlTask

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.control.stride != self.cache.tokenizer.stride:
            raise ConfigError(f"control.stride={config.control.stride}: the tokenizer {config.tokenizer} has "
                              f"{self.cache.tokenizer.stride} pixels per token; write control.stride="
                              f"{self.cache.tokenizer.stride}")

    def _load_weights(self) -> None:
        """Those of a pretrained encoder, too; weights of `init_from` take their place."""
        if self.config.encoder_weights:
            weights = read_weights(Path(self.config.encoder_weights))
            self.network.control.load_encoder(encoder_state(weights).state)
        super()._load_weights()

    def initial_state(self, name: str, folder: Path) -> dict[str, Tensor]:
        """Of a network with the layers that the run adds."""
        state = super().initial_state(name, folder)
        new = {"transformer": self.config.new_layers, "control": self.config.new_control_layers}[name]
        return deepened(getattr(self.network, name), state, new) if new else state

    def maps(self, source: Source, crop: Crop) -> MapSource:
        """Maps of the kind that the run asks for. Raises ConfigError on an incomplete cache."""
        config, types, shares = self.config, self.config.control.types, self.config.type_shares()
        if config.maps == "random":
            return RandomMaps(types, shares)
        if config.maps == "extracted":
            return ExtractedMaps(types, shares)
        if not config.data.cache:
            raise ConfigError("maps=cached: data.cache is empty; name the folder that arimg data maps has filled")
        caches = [maps_cache(config.data, crop, source, name) for name in types]
        return CachedMaps(types, shares, caches, crop.count(cached=True))

    def control(self, examples: Sequence[Example], drop_B: Tensor, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """(maps, type ids, keep control): dropped by control_dropout and, by drop_together, where the class is."""
        keep_B = torch.from_numpy(rng.random(len(examples)) >= self.config.control_dropout)
        together_B = torch.from_numpy(rng.random(len(examples)) < self.config.drop_together)
        return *stacked(examples), keep_B & ~(drop_B & together_B)

    def held_out_control(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """All kept."""
        return *stacked(examples), torch.ones(len(examples), dtype=torch.bool)

    def control_types(self) -> tuple[str, ...]:
        """Those that the adapter is trained on."""
        types: tuple[str, ...] = self.config.control.types
        return types


def stacked(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(maps_B3HW in [-1, 1], type ids)."""
    maps = [example.map_HW3 for example in examples if example.map_HW3 is not None]
    return to_images(np.stack(maps)), torch.tensor([example.type_id for example in examples])
