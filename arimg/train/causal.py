"""Objectives `causal` and `causal-control`: the causal model of continuous tokens, teacher-forced; every token counts
(Li et al. 2024, arXiv:2406.11838, section 4.2: the autoregressive baseline)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from arimg.accel.base import Decoder
from arimg.accel.masked import ArContinuous
from arimg.checkpoints import PipelineSettings
from arimg.models.causal import CausalConfig, CausalTransformer
from arimg.train.ar import ARRun, ARTask
from arimg.train.control import ControlObjective, ControlRun, ControlTask
from arimg.train.mar import HeadFields, MARObjective, MARTask


@dataclass(frozen=True)
class CausalRun(HeadFields, ARRun):
    """A run of the transformer on latents."""

    model: CausalConfig = field(default_factory=CausalConfig)       # type: ignore[assignment]
    settings: PipelineSettings = PipelineSettings(decoder="ar-continuous")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self)


@dataclass(frozen=True)
class CausalControlRun(HeadFields, ControlRun):
    """A joint run of model and control adapter."""

    model: CausalConfig = field(default_factory=CausalConfig)       # type: ignore[assignment]
    settings: PipelineSettings = PipelineSettings(decoder="ar-continuous")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self)


class CausalTask(MARTask):
    """The head's loss on all tokens."""

    def new_transformer(self, config: Any, codebook_VC: Tensor | None) -> Any:
        """The network of the config, fresh."""
        return CausalTransformer(config.model)

    def context(self, tokens_BLC: Tensor, masked_BL: Tensor, condition: Any, control: Sequence[Tensor]) -> Tensor:
        """z_BLD of the teacher-forced pass."""
        z_BLD: Tensor = self.transformer(tokens_BLC, condition, self.grid, self.inject(*control))
        return z_BLD


class CausalControlTask(CausalTask, ControlTask):
    """The same with control; dropped controls add zero."""


class CausalObjective(MARObjective):
    """Train on any source with a KL tokenizer."""

    config_class: type[ARRun] = CausalRun
    task_class: type[ARTask] = CausalTask
    decoder_class: Callable[[], Decoder] = ArContinuous

    def masked(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Every token is predicted."""
        return np.ones(shape, dtype=bool)


class CausalControlObjective(CausalObjective, ControlObjective):
    """The same with control maps."""

    config_class = CausalControlRun         # type: ignore[assignment]
    task_class = CausalControlTask
