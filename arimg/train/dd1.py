"""Objective `dd1`: the student of Distilled Decoding 1 (Liu et al. 2024, arXiv:2412.17153, section 3.2) on the pairs of
`arimg data pairs`, for every teacher that makes them.

A sample draws one of the timesteps; its first units are the pair's codes, the others the pair's noise, and the end of
the trajectory is the target. Before `split` the logits learn by cross entropy, from it on the latents by their distance
and by that of the pictures painted with them. No training code was published, so the weights of the three are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arimg.accel.base import Decoder, DecodeRequest
from arimg.accel.dd1 import Dd1, Schedule, starting_noise
from arimg.errors import ConfigError
from arimg.models.students import ARStudent, checked_timesteps, clean_mask
from arimg.models.var_students import VARStudent
from arimg.train.data import batch_rng
from arimg.train.dd import DDObjective, DDRun, without_dropout
from arimg.train.dd_losses import perceptual_input, student_losses
from arimg.train.objective import Batch, Figures, Losses
from arimg.train.tokenizer import LpipsFiles


@dataclass(frozen=True)
class DD1Run(DDRun):
    """A run of a student. Raises ConfigError."""

    timesteps: tuple[int, ...] = (0,)       # clean units (tokens or scales) of the passes that it learns
    split: int | None = None                # units from here on end as latents, earlier ones as codes; None: all
    distance: float = 1.0                   # weight of |latent - code vector|^2
    perceptual: float = 0.0                 # weight of the distance between painted pictures
    lpips: LpipsFiles = field(default_factory=LpipsFiles)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.distance, self.perceptual) < 0:
            raise ConfigError(f"distance={self.distance}, perceptual={self.perceptual}: are weights; give numbers >= 0")
        checked_timesteps(self.timesteps, self.split)


class DD1Objective(DDObjective):
    """Train on pairs, with the control and the kind of condition that they have."""

    config_class = DD1Run
    decoder = "dd1"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        units = len(self.ends) - 1
        if config.timesteps[-1] >= units:
            raise ConfigError(f"timesteps={list(config.timesteps)}: this teacher paints {units} units, so the last "
                              f"timestep may be {units - 1}")
        self.split = self.ends[-1] if config.split is None else self.ends[min(config.split, units)]
        self.network = self.started(without_dropout(self._new_student()))
        self.perceptual = config.lpips.network().requires_grad_(False) if config.perceptual else None

    def _new_student(self) -> nn.Module:
        teacher, passes = self.teacher.transformer, (self.config.timesteps, self.config.split)
        if self.scales:
            return VARStudent.from_teacher(teacher, *passes)
        return ARStudent.from_teacher(teacher, self.space.codebook_VC.shape[1], *passes)

    def batch(self, step: int, micro: int) -> Batch:
        """(codes, clean units, seeds, conditions, ...) of training pairs."""
        numbers = self.numbers(step, micro)
        chosen = batch_rng(self.config.seed, step, micro).choice(self.config.timesteps, len(numbers))
        return self.codes(numbers), torch.from_numpy(np.asarray(chosen)), *self.conditions(numbers)

    def losses(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> tuple[Losses, Figures]:
        """Its loss, and the share of noise tokens whose code it guesses."""
        codes_BL, units_B, *conditions = batch
        loss, figures = self.loss(networks["network"], codes_BL, units_B, self.request(*conditions))
        return {"network": loss}, figures

    def loss(self, student: Any, codes_BL: Tensor, units_B: Tensor, request: DecodeRequest) -> tuple[Tensor, Figures]:
        """Scalar loss and figures of pairs at these timesteps."""
        config, codebook_VC = self.config, self.space.codebook_VC
        clean_B = torch.tensor(self.ends, device=units_B.device)[units_B]
        clean_BL1 = clean_mask(clean_B, codes_BL.shape[1])[..., None]
        input_BLC = torch.where(clean_BL1, codebook_VC[codes_BL], starting_noise(request))
        logits_BLV, latents_BLC = student(input_BLC, clean_B, request.condition, request.grid, request.inject_KBLD)
        logits_BLV, latents_BLC = logits_BLV.float(), latents_BLC.float()
        entropy, distance = student_losses(logits_BLV, latents_BLC, codes_BL, codebook_VC, clean_B, self.split)
        loss = entropy + config.distance * distance
        right_BL = (logits_BLV.argmax(-1) == codes_BL) & ~clean_BL1[..., 0]
        figures = {"agreement": right_BL.sum() / (~clean_BL1).sum()}
        if self.perceptual is not None:
            seen_BLC = perceptual_input(latents_BLC, codes_BL, codebook_VC, clean_B, self.split)
            pictures, wanted = (self.painted(one, request) for one in (seen_BLC, codebook_VC[codes_BL]))
            figures["perceptual"] = self.perceptual.to(pictures.device)(pictures, wanted).mean()
            loss = loss + config.perceptual * figures["perceptual"]
        return loss, figures

    @torch.no_grad()
    def validation_loss(self, network: Any) -> float:
        """The loss of held-out pairs at the first timestep."""
        device = next(network.parameters()).device
        codes_BL = self.codes(self.held_out).to(device)
        units_B = torch.full((len(codes_BL),), self.config.timesteps[0], device=device)
        return float(self.loss(network, codes_BL, units_B, self.held_out_request(device))[0])

    def decoders(self, network: Any) -> Sequence[Decoder]:
        """One pass, and those of the schedule if these are more."""
        timesteps, split = self.config.timesteps, self.config.split
        return [Dd1(network, Schedule(steps, split)) for steps in sorted({timesteps[:1], timesteps})]
