"""What both stages of Distilled Decoding 2 share (Liu et al. 2025, arXiv:2510.21003, section 3), and the first of them,
objective `dd2-tuning` (AR-diffusion tuning): a network of the teacher's backbone and a velocity head learns the
teacher's conditional scores on the teacher's own sequences.

Letters: Q draws of a time and of noise for each token; B images; L tokens; N cells that the slots after the prefix
read; C latent channels; V codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arimg.accel import flow
from arimg.accel.audit import teacher_forced
from arimg.accel.base import Decoder, DecodeRequest
from arimg.accel.dd2 import ArDiffusion, shifted
from arimg.checkpoints import save_component
from arimg.errors import ConfigError, UnknownNameError
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from arimg.models.generators import ARGenerator, VARGenerator
from arimg.train.data import batch_rng
from arimg.train.dd import DDObjective, DDRun, without_dropout
from arimg.train.dd_losses import fake_score_loss, ground_truth_score_loss, noised
from arimg.train.objective import Batch, Figures, Losses

TUNING_LOSSES = ("gts", "fcs")
_HELD_OUT = 6           # purpose of a random draw
_FIT_CODES = 1024       # of the codebook per step of `fit_reader`


@dataclass(frozen=True)
class ScoreRun(DDRun):
    """What runs on scores are told. Raises ConfigError."""

    draws: int = 4              # times and noises per token and pass of a backbone; the paper's m, MAR's 4
    t_min: float = 0.02         # times are uniform in [t_min, 1]: towards 0 scores grow as 1 / t^2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1 or not 0 < self.t_min < 1:
            raise ConfigError(f"draws={self.draws}, t_min={self.t_min}: needs at least 1 draw, and a time in (0, 1)")


@dataclass(frozen=True)
class TuningRun(ScoreRun):
    """A run of the first stage. Raises ConfigError."""

    head_width: int = 1024      # with depth 4 the paper's parameter totals
    head_depth: int = 4
    head_only: bool = False     # the backbone stays the teacher's
    loss: str = "gts"           # gts: the teacher's velocity, which is the mean of fcs's target | fcs: eps - q
    fit_steps: int = 1000       # of a raster's token MLP towards the teacher's table, before the run

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in TUNING_LOSSES:
            raise UnknownNameError("loss", self.loss, TUNING_LOSSES)


class ScoreTask(nn.Module):
    """The velocities of a network that reads tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, read_BNC: Tensor, x_QBLC: Tensor, t_QBL1: Tensor, condition: Condition, grid: tuple[int, int],
                inject_KBLD: Tensor | None) -> Tensor:
        """v_QBLC of noised tokens, one pass of the backbone for all draws."""
        velocity_QBLC: Tensor = self.network.velocity(
            x_QBLC, t_QBL1, self.network.features(read_BNC, condition, grid, inject_KBLD))
        return velocity_QBLC.float()


class ScoreObjective(DDObjective):
    """Noised tokens, and what the teacher says of them."""

    def corruption(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(t_QBL1, noise_QBLC) for so many images."""
        shape = (self.config.draws, count, self.ends[-1])
        times = self.config.t_min + (1 - self.config.t_min) * rng.random((*shape, 1), dtype=np.float32)
        return torch.from_numpy(times), normal(rng, *shape, self.space.codebook_VC.shape[1])

    @torch.no_grad()
    def teacher_log_p(self, codes_BL: Tensor, request: DecodeRequest) -> Tensor:
        """log_p_BLV: the teacher's guided and filtered law of each token given the codes before it."""
        with torch.autocast(codes_BL.device.type, enabled=False):
            laws = teacher_forced(self.teacher.transformer, request, codes_BL)
            return torch.cat([p_BWV for _, p_BWV in laws], dim=1).log()

    def teacher_velocity(self, x_QBLC: Tensor, t_QBL1: Tensor, log_p_BLV: Tensor) -> Tensor:
        """v_QBLC of the flow into these laws, differentiable in x."""
        with torch.autocast(x_QBLC.device.type, enabled=False):
            return torch.stack([flow.velocity(x_BLC, t_BL1, log_p_BLV, self.space.codebook_VC)
                                for x_BLC, t_BL1 in zip(x_QBLC, t_QBL1)])


class TuningObjective(ScoreObjective):
    """Train on the codes of pairs."""

    config_class = TuningRun
    decoder = "dd2"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.network = ScoreTask(self.started(without_dropout(self._new_network())))
        if config.head_only:
            self.network.network.backbone.requires_grad_(False)

    def _new_network(self) -> nn.Module:
        config, teacher = self.config, self.teacher.transformer
        if self.scales:
            return VARGenerator.from_teacher(teacher, config.head_width, config.head_depth)
        codebook_VC = self.space.codebook_VC
        network = ARGenerator.from_teacher(teacher, codebook_VC.shape[1], config.head_width, config.head_depth)
        if not config.init_from:
            fit_reader(network.backbone.tok_embeddings, codebook_VC, teacher, config.fit_steps)
        return network

    def batch(self, step: int, micro: int) -> Batch:
        """(codes, times, noise, seeds, conditions, ...) of training pairs."""
        return self._inputs(self.numbers(step, micro), batch_rng(self.config.seed, step, micro))

    def _inputs(self, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        return self.codes(numbers), *self.corruption(len(numbers), rng), *self.conditions(numbers)

    def losses(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> tuple[Losses, Figures]:
        """The mean over tokens."""
        return {"network": self.loss(networks["network"], *batch)}, {}

    def loss(self, network: Any, codes_BL: Tensor, t_QBL1: Tensor, noise_QBLC: Tensor, *conditions: Tensor) -> Tensor:
        """Scalar: GTS or FCS of these tokens."""
        request = self.request(*conditions)
        q_BLC = self.space.codebook_VC[codes_BL]
        x_QBLC = noised(q_BLC, t_QBL1, noise_QBLC)
        velocity_QBLC = network(shifted(q_BLC, self.space), x_QBLC, t_QBL1, request.condition, request.grid,
                                request.inject_KBLD)
        if self.config.loss == "fcs":
            return fake_score_loss(velocity_QBLC, q_BLC, noise_QBLC).mean()
        wanted_QBLC = self.teacher_velocity(x_QBLC, t_QBL1, self.teacher_log_p(codes_BL, request))
        return ground_truth_score_loss(velocity_QBLC, wanted_QBLC).mean()

    @torch.no_grad()
    def validation_loss(self, network: Any) -> float:
        """The loss on held-out pairs, always at the same times and noises."""
        device = next(network.parameters()).device
        batch = self._inputs(self.held_out, np.random.default_rng([self.config.seed, _HELD_OUT]))
        return float(self.loss(network, *(tensor.to(device) for tensor in batch)))

    def decoders(self, network: Any) -> Sequence[Decoder]:
        """The sampler of this stage: ten steps per token."""
        return [ArDiffusion(network.network)]

    def export(self, network: Any, folder: Path) -> None:
        """The network alone, as a component folder: a step towards a student, and none yet."""
        save_component(network.network, folder / "tuned")


def fit_reader(reader: nn.Module, codebook_VC: Tensor, teacher: ARTransformer, steps: int) -> None:
    """Train the MLP that replaces a raster's token table: sum_i |mlp(c_i) - table(i)|^2 (section 3.2)."""
    optimizer, generator = torch.optim.Adam(reader.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        codes_N = torch.randint(len(codebook_VC), (min(_FIT_CODES, len(codebook_VC)),), generator=generator)
        with torch.no_grad():
            rows_ND = teacher.embed(codes_N[None], codes_N[None])[0]
        optimizer.zero_grad()
        (reader(codebook_VC[codes_N]) - rows_ND).square().sum(-1).mean().backward()
        optimizer.step()
    reader.zero_grad()


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Gaussian float32."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
