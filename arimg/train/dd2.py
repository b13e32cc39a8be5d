"""Objective `dd2`: the one-step generator of Distilled Decoding 2 (Liu et al. 2025, arXiv:2510.21003, section 3) by
conditional score distillation, from the network that `dd2-tuning` exported.

Every step trains the guidance network on the generator's tokens (FCS); every K-th trains the generator, too (CSD). For
the alignment stage the generator takes the average of its weights and rests while the guidance network catches up.
The teacher reads the codes nearest to the generator's tokens; the guidance network reads the tokens themselves.

Not in the paper, and off unless asked for: a loss on the noise and codes of pairs beside CSD (`pair_weight`), as the
distillation by reverse KL has it (Yin et al. 2024, arXiv:2311.18828, section 3.3). A score repeats what is likely
sooner than it finds what is missing; pairs tell of every mode which noise it belongs to.

A value of CSD measures no progress: `distance`, the mean |f_teacher - f_fake|^2 of a token, does, and the validation
loss says how unlikely the teacher finds what the generator paints.

Letters as in train/dd_scores.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arimg.accel.base import Decoder, DecodeRequest
from arimg.accel.dd1 import starting_noise
from arimg.accel.dd2 import Dd2, shifted
from arimg.checkpoints import load_component
from arimg.errors import ConfigError, UnknownNameError
from arimg.train.data import batch_rng
from arimg.train.dd import without_dropout
from arimg.train.dd_losses import (denoised, fake_score_loss, noised, pair_loss, reverse_kl_loss,
                                   score_distillation_loss, sid_weight, squared_distance)
from arimg.train.dd_scores import ScoreObjective, ScoreRun, ScoreTask, normal
from arimg.train.objective import Batch, Figures, Losses, Player
from arimg.train.run import AdamWConfig

DISTILLATION_LOSSES = ("csd", "reverse-kl")
WEIGHTS = ("sid", "one")
_LEAST_LOG_P = -20.0        # of a code that the teacher's filters have cut off, in the validation loss


@dataclass(frozen=True)
class Turns:
    """When the generator trains; the guidance network trains in every step after `pairs_alone`. Raises ConfigError."""

    pairs_alone: int = 0        # first steps, in which the generator learns pairs alone, at every step
    updates: int = 5            # K: updates of the guidance network for each of the generator's
    align_at: int = 0           # steps before the alignment; 0 = there is none
    align_steps: int = 0        # of the guidance network alone
    updates_after: int = 2      # K after the alignment

    def __post_init__(self) -> None:
        steps = (self.pairs_alone, self.align_at, self.align_steps)
        if min(self.updates, self.updates_after) < 1 or min(steps) < 0:
            raise ConfigError(f"turns: updates={self.updates}, updates_after={self.updates_after}, (pairs_alone, "
                              f"align_at, align_steps)={steps}: give at least 1 update, and no negative steps")
        if 0 < self.align_at < self.pairs_alone:
            raise ConfigError(f"turns: align_at={self.align_at}: lies within the first {self.pairs_alone} steps, on "
                              f"pairs alone; write align_at={self.pairs_alone} or more")

    def generator_trains(self, step: int) -> bool:
        """At step 0, 1, ..."""
        if step < self.pairs_alone:
            return True
        if not self.align_at or step < self.align_at:
            return (step + 1 - self.pairs_alone) % self.updates == 0
        since = step - self.align_at - self.align_steps
        return since >= 0 and (since + 1) % self.updates_after == 0


@dataclass(frozen=True)
class DD2Run(ScoreRun):
    """A run of the second stage; `init_from` is the folder `tuned` that the first one exported. `optim` is the
    generator's, whose schedule counts its own updates. Raises ConfigError."""

    guidance: AdamWConfig = field(default_factory=AdamWConfig)      # the guidance network's optimiser
    turns: Turns = Turns()
    loss: str = "csd"           # csd: SiD's form, as published | reverse-kl: needs no gradient through the networks
    alpha: float = 1.0          # of csd, as published; 0.5 to 1 is stable
    weight: str = "sid"         # w(t): sid: 1 / mean |q - f_teacher|, keeps the loss of one size over t | one
    pair_weight: float = 0.0    # of the loss on pairs beside it; 0, as published: the generator never sees pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init_from:
            raise ConfigError("init_from: is empty; give the folder tuned that a dd2-tuning run exported")
        for kind, name, known in (("loss", self.loss, DISTILLATION_LOSSES), ("weight", self.weight, WEIGHTS)):
            if name not in known:
                raise UnknownNameError(kind, name, known)
        if self.pair_weight < 0 or self.turns.pairs_alone and not self.pair_weight:
            raise ConfigError(f"pair_weight={self.pair_weight}, turns.pairs_alone={self.turns.pairs_alone}: the weight "
                              "is a number >= 0, and above 0 where steps are spent on pairs; write pair_weight=1")


class DD2Objective(ScoreObjective):
    """Train on noise, under the conditions of pairs; their own noise and codes serve `pair_weight` and validation."""

    config_class = DD2Run
    decoder = "dd2"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.generator: Any = without_dropout(load_component(config.init_from, torch.float32))
        self.guidance = ScoreTask(copy.deepcopy(self.generator))

    def players(self) -> dict[str, Player]:
        """Generator and guidance network."""
        config, steps = self.config, self.config.optim.steps
        updates = sum(config.turns.generator_trains(step) for step in range(steps))
        return {"generator": Player(self.generator, config.optim, max(1, updates), renewed_at=config.turns.align_at),
                "guidance": Player(self.guidance, config.guidance, max(1, steps - config.turns.pairs_alone),
                                   averaged=False)}

    def batch(self, step: int, micro: int) -> Batch:
        """(codes, generator's noise, times, noise, seeds, conditions, ...) of training pairs; new noise, or where the
        loss on pairs counts, theirs."""
        numbers, rng = self.numbers(step, micro), batch_rng(self.config.seed, step, micro)
        if self.config.pair_weight:
            noise_BLC = self.pairs.noise(self.pairs.rows(numbers), self.space.codebook_VC)
        else:
            noise_BLC = normal(rng, len(numbers), self.ends[-1], self.space.codebook_VC.shape[1])
        return self.codes(numbers), noise_BLC, *self.corruption(len(numbers), rng), *self.conditions(numbers)

    def losses(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> tuple[Losses, Figures]:
        """FCS, and CSD where it is the generator's turn: both of the weights before this step. Pairs come first."""
        codes_BL, noise_BLC, t_QBL1, noise_QBLC, *conditions = batch
        request, trains = self.request(*conditions), self.config.turns.generator_trains(step)
        with torch.set_grad_enabled(trains):
            generator = networks["generator"] if trains else self.generator
            q_BLC = self.tokens(generator, noise_BLC, request)
        if step < self.config.turns.pairs_alone:
            return {"generator": pair_loss(q_BLC, codes_BL, self.space.codebook_VC)}, {}
        known_BLC = q_BLC.detach()
        x_QBLC = noised(known_BLC, t_QBL1, noise_QBLC)
        velocity_QBLC = networks["guidance"](shifted(known_BLC, self.space), x_QBLC, t_QBL1, request.condition,
                                             request.grid, request.inject_KBLD)
        losses = {"guidance": fake_score_loss(velocity_QBLC, known_BLC, noise_QBLC).mean()}
        if not trains:
            return losses, {}
        loss, distance = self.distillation(q_BLC, t_QBL1, noise_QBLC, request)
        if self.config.pair_weight:
            loss = loss + self.config.pair_weight * pair_loss(q_BLC, codes_BL, self.space.codebook_VC)
        return {"generator": loss, **losses}, {"distance": distance}

    def tokens(self, generator: Any, noise_BLC: Tensor, request: DecodeRequest) -> Tensor:
        """tokens_BLC of one step, float32."""
        q_BLC: Tensor = generator(shifted(noise_BLC, self.space), noise_BLC, request.condition, request.grid,
                                  request.inject_KBLD)
        return q_BLC.float()

    def distillation(self, q_BLC: Tensor, t_QBL1: Tensor, noise_QBLC: Tensor,
                     request: DecodeRequest) -> tuple[Tensor, Tensor]:
        """The generator's scalar loss, and the mean |d|^2. Neither network learns from it how to read earlier tokens:
        both read them detached."""
        config, guidance, known_BLC = self.config, self.guidance.network, q_BLC.detach()
        with torch.no_grad():
            feature_BLD = guidance.features(shifted(known_BLC, self.space), request.condition, request.grid,
                                            request.inject_KBLD)
        x_QBLC = noised(q_BLC, t_QBL1, noise_QBLC)
        self.guidance.requires_grad_(False)
        fake_QBLC = denoised(x_QBLC, t_QBL1, guidance.velocity(x_QBLC, t_QBL1, feature_BLD).float())
        self.guidance.requires_grad_(True)
        log_p_BLV = self.teacher_log_p(self.space.nearest(known_BLC), request)
        teacher_QBLC = denoised(x_QBLC, t_QBL1, self.teacher_velocity(x_QBLC, t_QBL1, log_p_BLV))
        q_QBLC = q_BLC.expand_as(x_QBLC)
        weight = sid_weight(q_QBLC, teacher_QBLC) if config.weight == "sid" else 1.0
        if config.loss == "csd":
            loss_QBL = score_distillation_loss(q_QBLC, fake_QBLC, teacher_QBLC, config.alpha, weight)
        else:
            loss_QBL = reverse_kl_loss(q_QBLC, fake_QBLC, teacher_QBLC, weight)
        return loss_QBL.mean(), squared_distance(teacher_QBLC, fake_QBLC).detach().mean()

    @torch.no_grad()
    def validation_loss(self, network: Any) -> float:
        """By how many nats per token the teacher finds the generator's codes less likely than its own, under held-out
        conditions. Below 0: the generator repeats what is likely."""
        device = next(network.parameters()).device
        request = self.held_out_request(device)
        own_BL = self.codes(self.held_out).to(device)
        painted_BL = self.space.nearest(self.tokens(network, starting_noise(request), request))
        own, painted = (self.teacher_log_p(codes_BL, request).gather(-1, codes_BL[..., None]).clamp_min(_LEAST_LOG_P)
                        for codes_BL in (own_BL, painted_BL))
        return float(own.mean() - painted.mean())

    def decoders(self, network: Any) -> Sequence[Decoder]:
        """One pass."""
        return [Dd2(network)]
