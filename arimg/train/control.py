"""Objective `control`: the AR transformer and its control adapter together, from the start (ControlAR section 3.2).

Each sample is a picture's codes, its class, and a control map extracted from the picture with random thresholds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance
from arimg.accel.target import Target
from arimg.checkpoints import PipelineSettings, load_component, load_state, save_pipeline
from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.control.canny import Canny
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.train.codes import CodeCache
from arimg.train.data import balanced_indices, batch_rng, to_images
from arimg.train.emoji import load_emoji
from arimg.train.run import RunConfig

_SHOWN = 8


@dataclass(frozen=True)
class ControlRun(RunConfig):
    """A joint run of model and control adapter on cached codes."""

    tokenizer: str = ""                     # tokenizer component folder
    model: ARConfig = field(default_factory=ARConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    settings: PipelineSettings = field(default_factory=PipelineSettings)
    control_dropout: float = 0.1            # share of samples without control, besides the model's class_dropout
    canny_low: tuple[float, float] = (50.0, 150.0)      # lower threshold, drawn uniformly; the upper one is twice it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer:
            raise ConfigError("tokenizer: is empty; give the folder that the tokenizer run exported, tokenizer=FOLDER")


class ControlTask(nn.Module):
    """Cross entropy of one batch in nats per token."""

    def __init__(self, config: ControlRun, codebook_VC: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = ARTransformer(config.model)
        if config.model.codebook_dim is not None:
            self.transformer.set_codebook(codebook_VC)
        self.control = ControlAdapter(config.control)
        self.grid = grid

    def forward(self, codes_BL: Tensor, class_ids_B: Tensor, maps_B3HW: Tensor, drop_class_B: Tensor,
                keep_control_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and figures. Dropped classes become the null class; dropped controls add zero."""
        condition = self.transformer.drop(Condition(class_ids_B=class_ids_B), drop_class_B)
        inject_KBLD = self.control.inject(maps_B3HW) * keep_control_B[:, None, None]
        logits_BLV = self.transformer(codes_BL, condition, self.grid, inject_KBLD)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), codes_BL.flatten())
        return loss, {}


class ControlObjective:
    """Train on an emoji folder with canny maps made on the fly."""

    config_class = ControlRun

    def __init__(self, config: ControlRun) -> None:
        self.config = config
        self.emoji = load_emoji(config.data.path())
        tokenizer = load_component(config.tokenizer, torch.float32)
        self.cache = CodeCache(config.data.path() / "codes", self.emoji.images, tokenizer, self.emoji.fingerprint)
        torch.manual_seed(config.seed)
        self.network = ControlTask(config, tokenizer.space().codebook_VC, self.cache.grid)
        if config.init_from:
            for name, module in (("transformer", self.network.transformer), ("control", self.network.control)):
                start = Path(config.init_from) / name
                load_state(module, load_component(start).state_dict(), str(start))
        self.train_indices = np.flatnonzero(~self.emoji.held_out)
        held_out = np.flatnonzero(self.emoji.held_out)
        self.held_out = np.random.default_rng(config.seed).permutation(held_out)

    def maps(self, indices: np.ndarray, lows: np.ndarray) -> Tensor:
        """Canny maps (B, 3, H, W) in [-1, 1] with these lower thresholds."""
        extracted = (Canny(low, 2 * low)(Image.fromarray(self.emoji.images[i])) for i, low in zip(indices, lows))
        return to_images(np.stack([np.asarray(image) for image in extracted]))

    def batch(self, step: int, rank: int, processes: int) -> tuple[Tensor, ...]:
        """(codes, class ids, maps, drop class, keep control)"""
        config, size = self.config, self.config.data.batch_size
        rng = batch_rng(config.seed, step, rank)
        indices = self.train_indices[balanced_indices(self.emoji.labels[self.train_indices], size, rng)]
        maps = self.maps(indices, rng.uniform(*config.canny_low, size))
        drop_class = torch.from_numpy(rng.random(size) < config.model.class_dropout)
        keep_control = torch.from_numpy(rng.random(size) >= config.control_dropout)
        return self.cache.get(indices), torch.from_numpy(self.emoji.labels[indices]), maps, drop_class, keep_control

    def after_step(self, step: int, network: nn.Module) -> dict[str, float]:
        """Nothing outside the gradient."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    @torch.no_grad()
    def validation_loss(self, network: ControlTask, count: int = 64) -> float:
        """Nats per token on held-out pictures with control and class."""
        network.eval()
        device = next(network.parameters()).device
        indices = self.held_out[:count]
        count = len(indices)
        batch = (self.cache.get(indices), torch.from_numpy(self.emoji.labels[indices]),
                 self.maps(indices, np.full(count, 100.0)), torch.zeros(count, dtype=torch.bool),
                 torch.ones(count, dtype=torch.bool))
        return float(network(*(tensor.to(device) for tensor in batch))[0])

    @torch.no_grad()
    def sample(self, network: ControlTask) -> Image.Image:
        """Held-out maps, originals, samples; logs the validation loss."""
        network.eval()
        device = next(network.parameters()).device
        indices = self.held_out[:_SHOWN]
        maps = self.maps(indices, np.full(len(indices), 100.0))
        condition = Condition(class_ids_B=torch.from_numpy(self.emoji.labels[indices]).to(device))
        request = DecodeRequest(condition, self.cache.grid, torch.arange(len(indices), device=device),
                                network.control.inject(maps.to(device)), Guidance(self.config.settings.cfg))
        result = PlainAR().decode(Target(network.transformer, request), request)
        assert result.codes_BL is not None
        painted = self.cache.tokenizer.decode_codes(result.codes_BL.cpu(), self.cache.grid)
        print(f"validation loss {self.validation_loss(network):.3f} nats per token", file=sys.stderr)
        pictures = torch.cat([maps, to_images(self.emoji.images[indices]), painted])
        return make_grid([to_pil(picture) for picture in pictures], columns=len(indices))

    def export(self, network: ControlTask, folder: Path) -> None:
        """The whole pipeline: tokenizer, transformer, control."""
        components: dict[str, Any] = {"tokenizer": self.cache.tokenizer, "transformer": network.transformer,
                                      "control": network.control}
        size = (self.emoji.images.shape[1], self.emoji.images.shape[2])
        settings = replace(self.config.settings, class_names=self.emoji.class_names, size=size,
                           control_types=self.config.control.types)
        save_pipeline(folder, components, settings)
