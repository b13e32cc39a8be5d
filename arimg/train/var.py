"""Objectives `var` and `var-control`: the next-scale transformer on codes of all scales (Tian et al. 2024,
arXiv:2404.02905, section 3.2), from any source, without and with a control adapter.

The loss is plain cross entropy in which every token of every scale weighs 1/L. What the network reads is computed from
the codes, so that sources, caches, classes, maps and the dropping of labels are those of `ar` and `control`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import Decoder
from arimg.accel.scale import ScaleByScale, scale_inputs
from arimg.checkpoints import PipelineSettings
from arimg.errors import ConfigError
from arimg.models.base import order_of
from arimg.models.var import VARConfig, VARTransformer
from arimg.registry import DECODERS
from arimg.train.ar import ARObjective, ARRun, ARTask, as_condition
from arimg.train.control import ControlObjective, ControlRun, ControlTask


@dataclass(frozen=True)
class VARRun(ARRun):
    """A run of the transformer on cached codes."""

    model: VARConfig = field(default_factory=VARConfig)         # type: ignore[assignment]
    settings: PipelineSettings = PipelineSettings(decoder="scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoder(self.settings.decoder)


@dataclass(frozen=True)
class VARControlRun(ControlRun):
    """A joint run of model and control adapter."""

    model: VARConfig = field(default_factory=VARConfig)         # type: ignore[assignment]
    settings: PipelineSettings = PipelineSettings(decoder="scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decoder(self.settings.decoder)


def _check_decoder(name: str) -> None:
    if order_of(DECODERS.load(name)) != "scales":
        raise ConfigError(f"settings.decoder={name}: the default decoder of a next-scale model is scale; write "
                          "decoder: scale")


class VARTask(ARTask):
    """Cross entropy of one batch in nats per token."""

    no_decay = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul_1H11")       # by the published recipe

    def new_transformer(self, config: Any, codebook_VC: Tensor) -> VARTransformer:
        """The network of the config, fresh."""
        return VARTransformer(config.model)

    def forward(self, codes_BL: Tensor, read_BNC: Tensor, conditions: Tensor, drop_B: Tensor,
                *control: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and figures: codes_BL of all scales are predicted from the cells read_BNC. Dropped classes become
        the null class; `control` is what `inject` takes."""
        condition = self.transformer.drop(as_condition(conditions), drop_B)
        logits_BLV = self.transformer(read_BNC, condition, self.inject(*control))
        return F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten()), {}


class VARControlTask(VARTask, ControlTask):
    """Cross entropy with control; dropped controls add zero."""

    def scales(self) -> tuple[tuple[int, int], ...]:
        """Those of the model."""
        scales: tuple[tuple[int, int], ...] = self.transformer.config.scales
        return scales


class VARObjective(ARObjective):
    """Train on an emoji folder with a tokenizer of several scales."""

    config_class: type[ARRun] = VARRun
    task_class: type[ARTask] = VARTask
    decoder_class: Callable[[], Decoder] = ScaleByScale

    def _sizes(self, stride: int) -> list[tuple[int, int]]:
        if self.config.data.buckets is not None:
            raise ConfigError("data.buckets: the scales of a next-scale model end at one size; leave it out")
        return super()._sizes(stride)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        super()._check_tokenizer(tokenizer)
        model, space = self.config.model, tokenizer.space()
        for name, value in (("scales", space.scales), ("codebook_dim", space.codebook_VC.shape[1])):
            if getattr(model, name) != value:
                raise ConfigError(f"model.{name}={getattr(model, name)}: the tokenizer {self.config.tokenizer} has "
                                  f"{value}; make them equal")

    def read(self, codes_BL: Tensor) -> Tensor:
        """read_BNC: the cells of the maps that the slots after the first scale read."""
        space = self.cache.tokenizer.space()
        return scale_inputs(space.codebook_VC[codes_BL.to(space.codebook_VC.device)], space)


class VARControlObjective(VARObjective, ControlObjective):
    """The same with maps made on the fly."""

    config_class = VARControlRun        # type: ignore[assignment]
    task_class = VARControlTask
