"""Objectives `mar` and `mar-control`: masked autoregression on continuous tokens (Li et al. 2024, arXiv:2406.11838,
section 3), from any source, without and with a control adapter. train/causal.py has the causal model.

Only masked tokens go through the head: with mask m, sum(loss * m) / sum(m) is the mean over those rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arimg.accel.base import Decoder, DecodeRequest, Guidance
from arimg.accel.masked import Masked
from arimg.accel.target import Target
from arimg.checkpoints import PipelineSettings
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.models.base import order_of
from arimg.models.mar import MARConfig, MARTransformer
from arimg.registry import DECODERS
from arimg.train.ar import SHOWN, VALIDATED, ARObjective, ARRun, ARTask, as_condition
from arimg.train.control import ControlObjective, ControlRun, ControlTask
from arimg.train.crops import Crop
from arimg.train.data import CodeSource, Example, batch_rng
from arimg.train.latents import open_moments, tokens_of
from arimg.train.sources import Source

MASK_STD = 0.25
_HELD_OUT = 5           # purpose of a random draw


@dataclass(frozen=True)
class HeadFields:
    """What all runs on continuous tokens share."""

    head_draws: int = 4             # times and noises per token and step

    def check(self, run: ARRun) -> None:
        """Raises ConfigError."""
        if self.head_draws < 1:
            raise ConfigError(f"head_draws={self.head_draws}: needs a whole number >= 1; MAR has 4")
        if run.token_noise:
            raise ConfigError(f"token_noise={run.token_noise}: continuous tokens have no near codes; leave it out")
        if order_of(DECODERS.load(run.settings.decoder)) != "continuous":
            raise ConfigError(f"settings.decoder={run.settings.decoder}: paints codes, but these tokens are continuous"
                              "; write decoder: masked (ar-continuous for the causal model)")


@dataclass(frozen=True)
class MaskFields(HeadFields):
    """And those of MAR."""

    mask_min: float = 0.7           # least share of masked tokens

    def check(self, run: ARRun) -> None:
        """Raises ConfigError."""
        super().check(run)
        if not 0 < self.mask_min <= 1:
            raise ConfigError(f"mask_min={self.mask_min}: is a share of the tokens; write a number in (0, 1], "
                              "MAR has 0.7")


@dataclass(frozen=True)
class MARRun(MaskFields, ARRun):
    """A run of the transformer on latents."""

    model: MARConfig = field(default_factory=MARConfig)             # type: ignore[assignment]
    settings: PipelineSettings = PipelineSettings(decoder="masked")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self)


@dataclass(frozen=True)
class MARControlRun(MaskFields, ControlRun):
    """A joint run of model and control adapter."""

    model: MARConfig = field(default_factory=MARConfig)             # type: ignore[assignment]
    settings: PipelineSettings = PipelineSettings(decoder="masked")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self)


class MARTask(ARTask):
    """The head's loss on masked tokens."""

    no_decay = ("diffloss", "head")         # nothing in the head decays, by the published recipe

    def new_transformer(self, config: Any, codebook_VC: Tensor | None) -> Any:
        """The network of the config, fresh."""
        return MARTransformer(config.model)

    def context(self, tokens_BLC: Tensor, masked_BL: Tensor, condition: Any, control: Sequence[Tensor]) -> Tensor:
        """z_BLD."""
        return self.transformer.context(condition, tokens_BLC, ~masked_BL, self.inject(*control))

    def forward(self, tokens_BLC: Tensor, masked_BL: Tensor, times_QN: Tensor, noise_QNC: Tensor,     # type: ignore
                conditions: Tensor, drop_B: Tensor, *control: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and figures. Q draws of a time in [0, 1) and of noise for each of the N masked tokens, image
        after image. Dropped classes become the null class; `control` is what `inject` takes."""
        condition = self.transformer.drop(as_condition(conditions), drop_B)
        z_BLD = self.context(tokens_BLC, masked_BL, condition, control)
        draws = len(times_QN)
        loss_M = self.transformer.head.training_loss(
            tokens_BLC[masked_BL].repeat(draws, 1), z_BLD[masked_BL].repeat(draws, 1), times_QN.flatten(),
            noise_QNC.flatten(0, 1))
        return loss_M.mean(), {}


class MARControlTask(MARTask, ControlTask):
    """The same with control; dropped controls add zero."""


def mask_ratio(rng: np.random.Generator, least: float) -> float:
    """A normal number around 1 with MASK_STD, cut off to [least, 1]: by drawing until one is inside."""
    while not least <= (ratio := rng.normal(1.0, MASK_STD)) <= 1:
        pass
    return float(ratio)


class MARObjective(ARObjective):
    """Train on any source with a KL tokenizer."""

    config: Any
    config_class: type[ARRun] = MARRun
    task_class: type[ARTask] = MARTask
    decoder_class: Callable[[], Decoder] = Masked

    def open_codes(self, source: Source, crop: Crop, tokenizer: Any) -> CodeSource:
        """Moments in place of codes."""
        return open_moments(self.config.data, crop, source, tokenizer)

    def new_task(self, tokenizer: Any) -> ARTask:
        """The network that is trained."""
        return self.task_class(self.config, torch.empty(0), self.grid)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        model, channels = self.config.model, getattr(tokenizer, "token_channels", None)
        if channels != model.token_channels:
            raise ConfigError(f"model.latent_channels={model.latent_channels}, model.patch={model.patch}: make tokens "
                              f"of {model.token_channels} numbers, those of the tokenizer {self.config.tokenizer} have "
                              f"{'codes' if channels is None else channels}; make them equal")
        if self.grid[0] * self.grid[1] != model.grid ** 2:
            raise ConfigError(f"model.grid={model.grid}: the pictures have {self.grid[0]}x{self.grid[1]} tokens; write "
                              f"model.grid={self.grid[0]}")

    def masked(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Bool (B, L): one ratio for the batch, a random set for each sample."""
        count = int(np.ceil(shape[1] * mask_ratio(rng, self.config.mask_min)))
        return rng.random(shape).argsort(1) < count

    def batch(self, step: int, micro: int = 0) -> tuple[Tensor, ...]:
        """(tokens, masked, times, noise, conditions, drop condition, ...) of training samples."""
        rng = batch_rng(self.config.seed, step, micro)
        examples = self.feed.batch(step, micro, self.sizes[int(rng.integers(len(self.sizes)))])
        drop_B = torch.from_numpy(rng.random(len(examples)) < self.config.model.class_dropout)
        return (*self._inputs(self.cache, examples, rng), self.conditions(examples, self.feed), drop_B,
                *self.control(examples, drop_B, rng))

    def _inputs(self, moments: Any, examples: Sequence[Example], rng: np.random.Generator) -> tuple[Tensor, ...]:
        """(tokens_BLC, masked_BL, times_QN, noise_QNC)."""
        moments_BChw, tokenizer = moments.of(examples), self.cache.tokenizer
        shape = (len(examples), self.grid[0] * self.grid[1])
        tokens_BLC = tokens_of(moments_BChw, _normal(rng, *shape, tokenizer.token_channels), tokenizer)
        masked_BL = self.masked(shape, rng)
        draws = (self.config.head_draws, int(masked_BL.sum()))
        times_QN = torch.from_numpy(rng.random(draws, dtype=np.float32))
        return tokens_BLC, torch.from_numpy(masked_BL), times_QN, _normal(rng, *draws, tokenizer.token_channels)

    @cached_property
    def held_out_batch(self) -> tuple[Tensor, ...]:
        """As `batch`, of held-out samples with nothing dropped: the same every time."""
        examples = self.held_out.held_out(VALIDATED, self.size)
        inputs = self._inputs(self.held_out.codes, examples, np.random.default_rng([self.config.seed, _HELD_OUT]))
        kept_B = torch.zeros(len(examples), dtype=torch.bool)
        return (*inputs, self.conditions(examples, self.held_out), kept_B, *self.held_out_control(examples))

    @torch.no_grad()
    def sample(self, network: Any) -> Image.Image:
        """Held-out maps (if any), reconstructions, samples of their conditions; says the validation loss."""
        network.eval()
        device = next(network.parameters()).device
        batch = self.held_out_batch
        tokens_BLC, conditions = batch[0][:SHOWN], batch[4][:SHOWN].to(device)
        control = [tensor[:SHOWN].to(device) for tensor in batch[6:]]
        request = DecodeRequest(as_condition(conditions), self.grid, torch.arange(len(conditions), device=device),
                                network.inject(*control), Guidance(self.config.settings.cfg))
        result = self.decoder_class().decode(Target(network.transformer, request), request)
        assert result.latents_BLC is not None
        tokenizer = self.cache.tokenizer
        place = next(tokenizer.parameters()).device
        rows = [tokenizer.decode(latents_BLC.mT.unflatten(2, self.grid).to(place)).cpu()
                for latents_BLC in (tokens_BLC, result.latents_BLC)]
        print(f"validation loss {self.validation_loss(network):.4f} per masked token", file=sys.stderr)
        pictures = torch.cat([*(map_B3HW.cpu() for map_B3HW in control[:1]), *rows])
        return make_grid([to_pil(picture) for picture in pictures], columns=len(conditions))


class MARControlObjective(MARObjective, ControlObjective):
    """The same with control maps."""

    config_class = MARControlRun            # type: ignore[assignment]
    task_class = MARControlTask


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
