"""The head that draws a continuous token from its condition z: a diffusion process run by a small MLP (Li et al. 2024,
"Autoregressive Image Generation without Vector Quantization", arXiv:2406.11838, section 3). State-dict keys are MAR's.

Letters: N tokens; C channels of a token; D width of z; G guidance branches; S noise vectors of a token; W head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.config import check_sizes
from arimg.errors import ConfigError
from arimg.models.base import HeadSample
from arimg.models.layers import at_least_float32
from arimg.models.schedule import TRAINING_STEPS, Schedule, StepNumbers, build_schedule
from arimg.models.time_embedding import TimeEmbedding

NORM_EPS = 1e-6
METHODS = ("ancestral", "ddim", "dpm++")
AHEAD_ROWS = 512        # rows whose modulations are computed in one product, ahead of the steps that use them
_HALF_BIN = 1 / 255     # of the discretised Gaussian at t = 0


@dataclass(frozen=True)
class HeadConfig:
    """Shape and sampler of a head. Raises ConfigError."""

    kind: str = "diffusion"         # diffusion | flow
    width: int = 1024
    layers: int = 6
    steps: str = "100"              # of the sampler: schedule.kept_timesteps for diffusion, a number for flow
    method: str = "ancestral"       # diffusion only: ancestral (MAR's) | ddim | dpm++ (fewer steps, no noise)
    last_std: float = 0.00625       # flow only: noise that `last_noise` adds to a token

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.kind not in ("diffusion", "flow"):
            raise ConfigError(f"kind {self.kind!r}: choose diffusion or flow")
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r}: choose {', '.join(METHODS)}")
        if self.last_std < 0:
            raise ConfigError(f"last_std {self.last_std}: needs a number >= 0")


@dataclass(frozen=True)
class HeadStep:
    """One step of the reverse process."""

    x_NC: Tensor                # what goes in
    x0_NC: Tensor               # the clean token that is predicted, not clipped
    mean_NC: Tensor
    log_variance_NC: Tensor
    next_NC: Tensor             # what comes out


def build_head(config: HeadConfig, channels: int, z_dim: int) -> nn.Module:
    """The head of this config for tokens of `channels` numbers and conditions of width `z_dim`."""
    if config.kind == "flow":
        from arimg.models.flow_head import FlowHead
        return FlowHead(config, channels, z_dim)
    return DiffusionHead(config, channels, z_dim)


# ---------------------------------------------------------------------------------------------------------------------
# The network


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


class ResBlock(nn.Module):
    """h += gate * MLP(LN(h) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Same shape as `h`."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return h + gate * self.mlp(modulate(self.in_ln(h), shift, scale))


class FinalLayer(nn.Module):
    """linear(LN(h) * (1 + scale) + shift)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """(..., outputs)."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class HeadMLP(nn.Module):
    """MLP with adaptive layer norm; time and condition enter through the modulations alone."""

    def __init__(self, channels: int, outputs: int, width: int, layers: int, z_dim: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(z_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(layers))
        self.final_layer = FinalLayer(width, outputs)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, matrix in self.time_embed.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(matrix, std=0.02)
        for block in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def modulations(self, y: Tensor) -> list[Tensor]:
        """Of each block (..., 3W) and of the final layer (..., 2W), for y = time + condition (..., W)."""
        y = F.silu(y)
        return [block.adaLN_modulation[1](y) for block in (*self.res_blocks, self.final_layer)]

    def denoise(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """(..., outputs) for noisy tokens (..., C)."""
        h = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block, modulation in zip(self.res_blocks, modulations):
            h = block(h, modulation)
        return self.final_layer(h, modulations[-1])

    def forward(self, x_NC: Tensor, t_N: Tensor, z_ND: Tensor) -> Tensor:
        """(N, outputs) at times in 0 .. 999."""
        return self.denoise(x_NC, self.modulations(self.time_embed(t_N) + self.cond_embed(z_ND)))

    def run(self, times: list[float], z_GND: Tensor) -> Iterator["HeadPass"]:
        """One HeadPass per time. Modulations do not depend on the noisy token, so those of many steps are one product:
        step by step, more than half of the weights would be read from memory again for a handful of rows."""
        device = z_GND.device
        times_TW = self.time_embed(torch.tensor(times, dtype=torch.float32, device=device))
        z_GNW = self.cond_embed(z_GND.to(self.cond_embed.weight.dtype))
        ahead = max(1, AHEAD_ROWS // max(1, z_GNW.shape[0] * z_GNW.shape[1]))
        for first in range(0, len(times), ahead):
            modulations = self.modulations(times_TW[first:first + ahead, None, None] + z_GNW)
            for k in range(modulations[0].shape[0]):
                yield HeadPass(self, [modulation[k] for modulation in modulations])


@dataclass(frozen=True)
class HeadPass:
    """The network at one time under one set of conditions."""

    net: HeadMLP
    modulations: list[Tensor]

    def __call__(self, x_NC: Tensor) -> Tensor:
        """(G, N, outputs) of the same noisy tokens under all branches."""
        return at_least_float32(self.net.denoise(x_NC[None], self.modulations))


def guide(branches_GNC: Tensor, scales_GN: Tensor | None) -> Tensor:
    """guided_NC, see models.base.Head.sample (Ho and Salimans 2022; three branches as in accel.target)."""
    guided_NC = branches_GNC[-1]
    for g in range(len(branches_GNC) - 2, -1, -1):
        assert scales_GN is not None
        guided_NC = guided_NC + scales_GN[g][:, None] * (branches_GNC[g] - branches_GNC[g + 1])
    return guided_NC


# ---------------------------------------------------------------------------------------------------------------------
# The process


class DiffusionHead(nn.Module):
    """Epsilon prediction with learned variance, cosine schedule, 1000 training steps.

    Samplers: `ancestral`, as published, and the deterministic `ddim` (Song et al. 2021) and `dpm++` (second order
    multistep, Lu et al. 2022), all ours: diffusers keeps its tables in float32, and its DDPM scheduler takes neither
    the respaced posterior nor the learned variance of branch 0. ddim agrees with diffusers' DDIMScheduler (tested).
    """

    def __init__(self, config: HeadConfig, channels: int, z_dim: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.net = HeadMLP(channels, 2 * channels, config.width, config.layers, z_dim)
        self.set_sampler(config.steps, config.method)

    def set_sampler(self, steps: str, method: str = "ancestral") -> None:
        """Sample with other steps or another method from now on. Raises ConfigError."""
        if method not in METHODS:
            raise ConfigError(f"method {method!r}: choose {', '.join(METHODS)}")
        self.schedule: Schedule = build_schedule(steps)
        self.method = method
        self.evaluations = len(self.schedule.steps)
        self.draws = 1 + self.evaluations
        self.has_density = method == "ancestral"

    def sample(self, z_GND: Tensor, noise_NSC: Tensor, scales_GN: Tensor | None = None, temperature: float = 1.0,
               last_noise: bool = False) -> HeadSample:
        """See models.base.Head."""
        earlier_NC, step = torch.zeros_like(noise_NSC[:, 0]), None
        for step in self.trajectory(z_GND, noise_NSC, scales_GN, temperature):
            earlier_NC = earlier_NC + step.log_variance_NC / 2
        assert step is not None
        std_NC = torch.zeros_like(step.mean_NC)
        if self.has_density:
            std_NC = torch.exp(step.log_variance_NC / 2) * temperature
        latents_NC = step.mean_NC
        if last_noise:
            assert self.has_density, self.method
            latents_NC = latents_NC + std_NC * noise_NSC[:, 1]
        return HeadSample(latents_NC, step.mean_NC, std_NC, earlier_NC - step.log_variance_NC / 2)

    def trajectory(self, z_GND: Tensor, noise_NSC: Tensor, scales_GN: Tensor | None = None,
                   temperature: float = 1.0) -> Iterator[HeadStep]:
        """The steps of the reverse process, noisiest first. The last one adds no noise."""
        x_NC, previous = noise_NSC[:, 0], None
        numbers = self.schedule.steps[::-1]
        passes = self.net.run([one.timestep for one in numbers], z_GND)
        for index, one, network in zip(range(len(numbers) - 1, -1, -1), numbers, passes):
            eps_GNC, v_GNC = network(x_NC).chunk(2, dim=-1)
            eps_NC = guide(eps_GNC, scales_GN)
            x0_NC = one.x0_of_x * x_NC - one.x0_of_eps * eps_NC
            log_variance_NC = _log_variance(v_GNC[0], one.log_beta, one.log_posterior)
            if self.method == "ancestral":
                mean_NC = one.mean_of_x0 * x0_NC + one.mean_of_x * x_NC
                noise_NC = noise_NSC[:, 1 + index] * temperature
                next_NC = torch.addcmul(mean_NC, torch.exp(log_variance_NC / 2), noise_NC) if index else mean_NC
            else:
                second_order = self.method == "dpm++" and index > 1     # the step to index 0 is too long for it
                mean_NC = next_NC = _without_noise(one, x_NC, x0_NC, eps_NC, previous if second_order else None)
                previous = (one, x0_NC)
            yield HeadStep(x_NC, x0_NC, mean_NC, log_variance_NC, next_NC)
            x_NC = next_NC

    def losses(self, target_NC: Tensor, z_ND: Tensor, t_N: Tensor, noise_NC: Tensor) -> tuple[Tensor, Tensor]:
        """(mse_N, variational_N): mean over channels of (noise - eps)^2, and the variational term in bits, whose eps
        is detached (Nichol and Dhariwal 2021, section 3.1; not rescaled by 1/1000). t_N: int64, 0 .. 999."""
        target_NC = at_least_float32(target_NC)
        table = build_schedule().table(target_NC.device, target_NC.dtype)
        one = StepNumbers(*table[t_N].T[..., None])         # (N, 1) each
        x_NC = (target_NC + one.x0_of_eps * noise_NC) / one.x0_of_x
        eps_NC, v_NC = at_least_float32(self.net(x_NC, t_N, z_ND)).chunk(2, dim=-1)
        mse_N = (noise_NC - eps_NC).square().mean(-1)
        x0_NC = one.x0_of_x * x_NC - one.x0_of_eps * eps_NC.detach()
        mean_NC = one.mean_of_x0 * x0_NC + one.mean_of_x * x_NC
        log_variance_NC = _log_variance(v_NC, one.log_beta, one.log_posterior)
        true_NC = one.mean_of_x0 * target_NC + one.mean_of_x * x_NC
        kl_NC = _gaussian_kl(true_NC, one.log_posterior, mean_NC, log_variance_NC)
        nll_NC = _discretised_nll(target_NC, mean_NC, log_variance_NC / 2)
        bits_N = torch.where(t_N[:, None] == 0, nll_NC, kl_NC).mean(-1) / math.log(2)
        return mse_N, bits_N

    def training_loss(self, target_NC: Tensor, z_ND: Tensor, t_N: Tensor, noise_NC: Tensor) -> Tensor:
        """See models.base.Head: mse + variational term."""
        mse_N, bits_N = self.losses(target_NC, z_ND, (t_N * TRAINING_STEPS).long(), noise_NC)
        return mse_N + bits_N


def _log_variance(v_NC: Tensor, log_beta: float, log_posterior: float) -> Tensor:
    """w log(beta) + (1 - w) log(posterior variance), w = (v + 1) / 2, not clamped."""
    return log_posterior + (v_NC + 1) / 2 * (log_beta - log_posterior)


def _without_noise(one: StepNumbers, x_NC: Tensor, x0_NC: Tensor, eps_NC: Tensor,
                   previous: tuple[StepNumbers, Tensor] | None) -> Tensor:
    """The next state by DDIM (eta = 0), or, given the step before, by DPM-Solver++(2M) in lambda = log(alpha / sigma),
    whose first-order step is DDIM's."""
    alpha, sigma = math.sqrt(one.alpha_bar_before), math.sqrt(1 - one.alpha_bar_before)
    if previous is None or sigma == 0:
        return alpha * x0_NC + sigma * eps_NC
    before, x0_before_NC = previous
    h = _half_log_snr(one.alpha_bar_before) - _half_log_snr(one.alpha_bar)
    ratio = (_half_log_snr(one.alpha_bar) - _half_log_snr(before.alpha_bar)) / h
    d_NC = x0_NC + (x0_NC - x0_before_NC) / (2 * ratio)
    return sigma / math.sqrt(1 - one.alpha_bar) * x_NC - alpha * math.expm1(-h) * d_NC


def _half_log_snr(alpha_bar: float) -> float:
    return math.log(alpha_bar / (1 - alpha_bar)) / 2


def _gaussian_kl(mean_p: Tensor, log_variance_p: float | Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p || q) of each coordinate, in nats."""
    log_ratio = log_variance_q - log_variance_p
    return (log_ratio - 1 + torch.exp(-log_ratio) + (mean_p - mean_q).square() * torch.exp(-log_variance_q)) / 2


def _discretised_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log of the mass of a Gaussian on [x - 1/255, x + 1/255], open beyond +-0.999: an image convention that MAR
    keeps for latents. The cumulative distribution is the tanh approximation, as released."""
    def cdf(u: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3))) / 2

    def log(p: Tensor) -> Tensor:
        return torch.log(p.clamp_min(1e-12))
    inverse = torch.exp(-log_std)
    above, below = cdf(inverse * (x - mean + _HALF_BIN)), cdf(inverse * (x - mean - _HALF_BIN))
    inside = torch.where(x > 0.999, log(1 - below), log(above - below))
    return -torch.where(x < -0.999, log(above), inside)
