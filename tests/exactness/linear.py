"""Networks of continuous tokens whose law is known: linear in the tokens before, with a Gaussian chain as head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.models.base import Condition, HeadSample


@dataclass(frozen=True)
class Chain:
    """x <- coef x + shift + std noise, the last entry being the last step."""

    coef_S: Tensor
    shift_S: Tensor
    std_S: Tensor

    def law(self, temperature: float = 1.0) -> tuple[float, float]:
        """Mean and variance of the last state, from x_T ~ N(0, 1)."""
        mean, variance = 0.0, 1.0
        for coef, shift, std in zip(self.coef_S.tolist(), self.shift_S.tolist(), self.std_S.tolist()):
            mean, variance = coef * mean + shift, coef ** 2 * variance + (temperature * std) ** 2
        return mean, variance


class ChainHead(nn.Module):
    """The chain in every channel. z holds what is added to the mean of the last step, guided, and what multiplies its
    standard deviation."""

    has_density = True

    def __init__(self, chain: Chain, channels: int = 1) -> None:
        super().__init__()
        self.chain, self.channels = chain, channels
        self.draws = 1 + len(chain.coef_S)

    def sample(self, z_GND: Tensor, noise_NSC: Tensor, scales_GN: Tensor | None = None, temperature: float = 1.0,
               last_noise: bool = False) -> HeadSample:
        """See models.base.Head."""
        z_GNC, factor_N1 = z_GND[..., :-1], z_GND[0, :, -1:]
        z_NC = z_GNC[-1]
        for g in range(len(z_GNC) - 2, -1, -1):
            assert scales_GN is not None
            z_NC = z_NC + scales_GN[g][:, None] * (z_GNC[g] - z_GNC[g + 1])
        x_NC, steps = noise_NSC[:, 0], list(zip(self.chain.coef_S, self.chain.shift_S, self.chain.std_S))
        for index, (coef, shift, std) in zip(range(len(steps) - 1, 0, -1), steps):
            x_NC = coef * x_NC + shift + temperature * std * noise_NSC[:, 1 + index]
        coef, shift, std = steps[-1]
        mean_NC, std_NC = coef * x_NC + shift + z_NC, (temperature * std * factor_N1).expand_as(x_NC)
        latents_NC = mean_NC + std_NC * noise_NSC[:, 1] if last_noise else mean_NC
        logs_NC = self.chain.std_S[:-1].log().sum().expand_as(x_NC)
        return HeadSample(latents_NC, mean_NC, std_NC, logs_NC)


@dataclass
class Slots:
    """The cache of the causal toy: what was read at each slot."""

    values_RSC: Tensor
    stop: int = 0

    def limit(self, stop: int) -> None:
        """See KVCache."""
        self.stop = stop


class LinearCausal(nn.Module):
    """z_j = bias_j + class effect + sum_{i<j} weights_LL[j, i] token_i."""

    prefix_length = 1
    inject_points = 0
    order = "continuous"

    def __init__(self, head: ChainHead, weights_LL: Tensor, bias_L: Tensor, class_effect: float = 0.0,
                 factors_L: Tensor | None = None) -> None:
        super().__init__()
        self.head, self.class_effect = head, class_effect
        self.weights_LL = nn.Parameter(weights_LL.tril(-1))
        self.bias_L = nn.Parameter(bias_L)
        self.factors_L = nn.Parameter(torch.ones_like(bias_L) if factors_L is None else factors_L)

    def null(self, condition: Condition) -> Condition:
        """Class 0 has no effect."""
        assert condition.class_ids_B is not None
        return Condition(class_ids_B=torch.zeros_like(condition.class_ids_B))

    def prefix(self, condition: Condition) -> Tensor:
        """The class effect."""
        assert condition.class_ids_B is not None
        effect_R = self.class_effect * condition.class_ids_B.to(self.bias_L.dtype)
        return effect_R[:, None, None].expand(-1, 1, self.head.channels)

    def embed(self, latents_RWC: Tensor, slots_RW: Tensor) -> Tensor:
        """The tokens themselves."""
        return latents_RWC

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], *_: Any) -> Slots:
        """Not a number where nothing was read."""
        return Slots(torch.full((rows, length, self.head.channels), torch.nan, dtype=self.bias_L.dtype))

    def step(self, x_RWC: Tensor, slots_RW: Tensor, cache: Slots, inject_KRWD: Tensor | None = None) -> Tensor:
        """See Backbone.step; column s of the output predicts token s."""
        rows = torch.arange(len(x_RWC))[:, None]
        cache.values_RSC[rows, slots_RW] = x_RWC
        assert int(slots_RW.max()) < max(cache.stop, self.prefix_length)
        length = len(self.bias_L)
        slots_RW = slots_RW.clamp(max=length - 1)
        seen_RWL = torch.arange(length) < slots_RW[..., None]
        tokens_RLC = cache.values_RSC[:, 1:]
        if tokens_RLC.shape[1] < length:
            tokens_RLC = nn.functional.pad(tokens_RLC, (0, 0, 0, length - tokens_RLC.shape[1]))
        weights_RWL = self.weights_LL[slots_RW] * seen_RWL
        products_RWLC = weights_RWL[..., None] * tokens_RLC[:, None]
        z_RWC = torch.where(seen_RWL[..., None], products_RWLC, 0.0).sum(2)
        z_RWC = z_RWC + self.bias_L[slots_RW][..., None] + cache.values_RSC[:, :1]
        return torch.cat([z_RWC, self.factors_L[slots_RW][..., None]], dim=-1)


class LinearMasked(nn.Module):
    """z_j = bias_j + class effect + sum over known tokens of weights_LL[j, i] token_i."""

    inject_points = 0
    order = "continuous"

    def __init__(self, head: ChainHead, weights_LL: Tensor, bias_L: Tensor, class_effect: float = 0.0) -> None:
        super().__init__()
        self.head, self.class_effect = head, class_effect
        self.weights_LL, self.bias_L = nn.Parameter(weights_LL), nn.Parameter(bias_L)

    null = LinearCausal.null

    def context(self, condition: Condition, latents_RLC: Tensor, known_RL: Tensor,
                inject_KRLD: Tensor | None = None) -> Tensor:
        """See MaskedBackbone."""
        assert condition.class_ids_B is not None
        z_RLC = torch.einsum("ji,ric->rjc", self.weights_LL, torch.where(known_RL[..., None], latents_RLC, 0.0))
        effect_R11 = self.class_effect * condition.class_ids_B.to(self.bias_L.dtype)[:, None, None]
        z_RLC = z_RLC + self.bias_L[:, None] + effect_R11
        return torch.cat([z_RLC, torch.ones_like(z_RLC[..., :1])], dim=-1)


@dataclass(frozen=True)
class Setup:
    """How the pictures of a test are asked for."""

    count: int
    length: int = 1
    temperature: float = 1.0
    guidance: Guidance = Guidance()
    steps: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def request(self) -> DecodeRequest:
        """One picture per seed."""
        classes = torch.ones(self.count, dtype=torch.int64)
        return DecodeRequest(Condition(class_ids_B=classes), (1, self.length),
                             torch.arange(self.count) + self.seed * 1_000_003, guidance=self.guidance,
                             sampling=Sampling(self.temperature), steps=self.steps, **self.options)


def chain(coef: list[float], shift: list[float], std: list[float]) -> Chain:
    """In float64."""
    return Chain(*(torch.tensor(values, dtype=torch.float64) for values in (coef, shift, std)))


def linear_law(weights_LL: Tensor, bias_L: Tensor, mean: float, variance: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x = A x + bias + e, e ~ N(mean, variance), A strictly lower triangular."""
    inverse = torch.linalg.inv(torch.eye(len(bias_L), dtype=torch.float64) - weights_LL.tril(-1))
    return inverse @ (bias_L + mean), variance * inverse @ inverse.T
