"""Objective `ar`: the class-conditional AR transformer on cached codes (LlamaGen section 2.2).

Objective `control` adds an adapter and maps to it (train/control.py).
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
from arimg.data import load_emoji, to_images
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.train.codes import CodeCache
from arimg.train.data import balanced_indices, batch_rng
from arimg.train.run import RunConfig

SHOWN = 8           # pictures in a sample grid
VALIDATED = 64      # held-out pictures that the validation loss is a mean of
NEAR = 64           # codes that may stand in for a code


@dataclass(frozen=True)
class ARRun(RunConfig):
    """A run of the transformer on cached codes."""

    tokenizer: str = ""                     # tokenizer component folder
    flip: bool = True                       # half of the samples are mirror images
    token_noise: float = 0.0                # largest share of a sample's codes that are read as a near code instead
    model: ARConfig = field(default_factory=ARConfig)
    settings: PipelineSettings = field(default_factory=PipelineSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer:
            raise ConfigError("tokenizer: is empty; give the folder that the tokenizer run exported, tokenizer=FOLDER")
        if self.model.conditioning != "class":
            raise ConfigError(f"model.conditioning={self.model.conditioning}: emoji come with classes; write class")
        if not 0 <= self.token_noise < 1:
            raise ConfigError(f"token_noise={self.token_noise}: is a share of the codes; write a number in [0, 1)")


class ARTask(nn.Module):
    """Cross entropy of one batch in nats per token."""

    def __init__(self, config: ARRun, codebook_VC: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = ARTransformer(config.model)
        if config.model.codebook_dim is not None:
            self.transformer.set_codebook(codebook_VC)
        self.grid = grid

    def forward(self, codes_BL: Tensor, read_BL: Tensor, class_ids_B: Tensor, drop_class_B: Tensor,
                *control: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and figures: codes_BL are predicted from the codes read_BL before them. Dropped classes become
        the null class; `control` is what `inject` takes."""
        condition = self.transformer.drop(Condition(class_ids_B=class_ids_B), drop_class_B)
        logits_BLV = self.transformer(read_BL, condition, self.grid, self.inject(*control))
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), codes_BL.flatten()), {}

    def inject(self, *control: Tensor) -> Tensor | None:
        """inject_KBLD: none here."""
        return None


class ARObjective:
    """Train on an emoji folder. An index of N or more means the mirror image, see CodeCache."""

    config_class: type[ARRun] = ARRun
    task_class: type[ARTask] = ARTask

    def __init__(self, config: Any) -> None:
        self.config = config
        self.emoji = load_emoji(config.data.path())
        tokenizer = load_component(config.tokenizer, torch.float32)
        self.cache = CodeCache(config.data.path() / "codes", self.emoji.images, tokenizer, self.emoji.fingerprint)
        self._check_sizes(tokenizer.vocab_size)
        torch.manual_seed(config.seed)
        codebook_VC = tokenizer.space().codebook_VC
        self.network = self.task_class(config, codebook_VC, self.cache.grid)
        self.near_VK = nearest_codes(codebook_VC, NEAR)
        if config.init_from:
            self._start_from(Path(config.init_from))
        self.train_indices = np.flatnonzero(~self.emoji.held_out)
        self.train_labels = self.emoji.labels[self.train_indices]
        held_out = np.flatnonzero(self.emoji.held_out)
        self.held_out = np.random.default_rng(config.seed).permutation(held_out)

    def _check_sizes(self, vocab_size: int) -> None:
        model = self.config.model
        if model.vocab_size != vocab_size:
            raise ConfigError(f"model.vocab_size={model.vocab_size}: the tokenizer {self.config.tokenizer} has "
                              f"{vocab_size} codes; write vocab_size: {vocab_size}")
        if model.num_classes != len(self.emoji.class_names):
            raise ConfigError(f"model.num_classes={model.num_classes}: the data set {self.config.data.path()} has "
                              f"{len(self.emoji.class_names)}; write num_classes: {len(self.emoji.class_names)}")

    def _start_from(self, folder: Path) -> None:
        """Weights of a pipeline folder. One that an `ar` run exported has no control: it starts at random."""
        for name, module in self.network.named_children():
            if name == "transformer" or (folder / name).is_dir():
                load_state(module, load_component(folder / name).state_dict(), str(folder / name))

    def batch(self, step: int, rank: int, processes: int) -> tuple[Tensor, ...]:
        """(codes, class ids, drop class, ...) of training pictures."""
        rng = batch_rng(self.config.seed, step, rank)
        indices = self.train_indices[balanced_indices(self.train_labels, self.config.data.batch_size, rng)]
        if self.config.flip:
            indices = indices + len(self.emoji.images) * (rng.random(len(indices)) < 0.5)
        drop_class_B = torch.from_numpy(rng.random(len(indices)) < self.config.model.class_dropout)
        codes_BL = self.cache.get(indices)
        read_BL = self.perturbed(codes_BL, rng)
        return codes_BL, read_BL, self.classes(indices), drop_class_B, *self.draw_control(indices, rng)

    def perturbed(self, codes_BL: Tensor, rng: np.random.Generator) -> Tensor:
        """Codes with a share of them, drawn per sample from [0, token_noise), replaced by near ones: the model learns
        to read its own small errors (as bitwise self-correction does, Han et al. 2024, arXiv:2412.04431)."""
        if not self.config.token_noise:
            return codes_BL
        shape = tuple(codes_BL.shape)
        replaced_BL = rng.random(shape) < rng.uniform(0, self.config.token_noise, (shape[0], 1))
        near_BL = self.near_VK[codes_BL.numpy(), rng.integers(0, self.near_VK.shape[1], shape)]
        return torch.where(torch.from_numpy(replaced_BL), torch.from_numpy(near_BL), codes_BL)

    def classes(self, indices: np.ndarray) -> Tensor:
        """class_ids_B, int64."""
        return torch.from_numpy(self.emoji.labels[indices % len(self.emoji.images)])

    def draw_control(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """What the task's `inject` takes, for training."""
        return ()

    def held_out_control(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """The same for held-out pictures: nothing dropped, always the same maps."""
        return ()

    def after_step(self, step: int, network: nn.Module) -> dict[str, float]:
        """Nothing outside the gradient."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered between steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    @torch.no_grad()
    def validation_loss(self, network: ARTask) -> float:
        """Nats per token on held-out pictures with class and control."""
        network.eval()
        device = next(network.parameters()).device
        indices = self.held_out[:VALIDATED]
        codes_BL, kept_B = self.cache.get(indices), torch.zeros(len(indices), dtype=torch.bool)
        inputs = (codes_BL, codes_BL, self.classes(indices), kept_B, *self.held_out_control(indices))
        return float(network(*(tensor.to(device) for tensor in inputs))[0])

    @torch.no_grad()
    def sample(self, network: ARTask) -> Image.Image:
        """Held-out maps (if any), originals, samples of their classes; says the validation loss."""
        network.eval()
        device = next(network.parameters()).device
        indices = self.held_out[:SHOWN]
        control = self.held_out_control(indices)
        inject_KBLD = network.inject(*(tensor.to(device) for tensor in control))
        request = DecodeRequest(Condition(class_ids_B=self.classes(indices).to(device)), self.cache.grid,
                                torch.arange(len(indices), device=device), inject_KBLD,
                                Guidance(self.config.settings.cfg))
        result = PlainAR().decode(Target(network.transformer, request), request)
        assert result.codes_BL is not None
        painted = self.cache.tokenizer.decode_codes(result.codes_BL.cpu(), self.cache.grid)
        print(f"validation loss {self.validation_loss(network):.3f} nats per token", file=sys.stderr)
        pictures = torch.cat([*control[:1], to_images(self.cache.pixels(indices)), painted])
        return make_grid([to_pil(picture) for picture in pictures], columns=len(indices))

    def export(self, network: ARTask, folder: Path) -> None:
        """The whole pipeline: tokenizer and what was trained."""
        size = (self.emoji.images.shape[1], self.emoji.images.shape[2])
        settings = replace(self.config.settings, class_names=self.emoji.class_names, size=size,
                           control_types=self.control_types())
        save_pipeline(folder, {"tokenizer": self.cache.tokenizer, **dict(network.named_children())}, settings)

    def control_types(self) -> tuple[str, ...]:
        """What the pipeline's users may give: none here."""
        return ()


def nearest_codes(codebook_VC: Tensor, count: int) -> np.ndarray:
    """int64 (V, K): the K nearest other codes of each code, K = count or as many as there are."""
    distances_VV = torch.cdist(codebook_VC.float(), codebook_VC.float()).fill_diagonal_(float("inf"))
    return distances_VV.topk(min(count, len(codebook_VC) - 1), largest=False).indices.numpy()
