"""The second head: flow matching (Lipman et al. 2023, arXiv:2210.02747) with the network of the diffusion head, as in
xAR (Ren et al. 2025, arXiv:2502.20388). See diffusion_head for the letters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arimg.errors import ConfigError
from arimg.models.base import HeadSample
from arimg.models.diffusion_head import HeadConfig, HeadMLP, guide
from arimg.models.layers import at_least_float32
from arimg.models.schedule import TRAINING_STEPS


class FlowHead(nn.Module):
    """x_t = (1 - t) noise + t token; the network predicts the velocity token - noise; Euler steps from 0 to 1.

    A deterministic sampler has no density. With `last_noise` the token is N(x_1, last_std^2), the same standard
    deviation for every network, so that reflection couplings apply. Temperature scales the starting noise too.
    """

    def __init__(self, config: HeadConfig, channels: int, z_dim: int) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.net = HeadMLP(channels, channels, config.width, config.layers, z_dim)
        self.draws = 2
        self.has_density = config.last_std > 0
        self.set_sampler(config.steps)

    def set_sampler(self, steps: str) -> None:
        """Sample with another number of Euler steps from now on. Raises ConfigError."""
        if not steps.isdigit() or int(steps) < 1:
            raise ConfigError(f"steps {steps!r}: the flow head takes a number of Euler steps, at least 1")
        self.steps = self.evaluations = int(steps)

    def sample(self, z_GND: Tensor, noise_NSC: Tensor, scales_GN: Tensor | None = None, temperature: float = 1.0,
               last_noise: bool = False) -> HeadSample:
        """See models.base.Head."""
        x_NC = noise_NSC[:, 0] * temperature
        for network in self.net.run([TRAINING_STEPS * k / self.steps for k in range(self.steps)], z_GND):
            x_NC = x_NC + guide(network(x_NC), scales_GN) / self.steps
        std_NC = torch.full_like(x_NC, self.config.last_std * temperature)
        latents_NC = x_NC
        if last_noise:
            assert self.has_density, self.config
            latents_NC = x_NC + std_NC * noise_NSC[:, 1]
        return HeadSample(latents_NC, x_NC, std_NC, torch.zeros_like(x_NC))

    def training_loss(self, target_NC: Tensor, z_ND: Tensor, t_N: Tensor, noise_NC: Tensor) -> Tensor:
        """See models.base.Head: mean over channels of the squared error of the velocity."""
        target_NC, t_N1 = at_least_float32(target_NC), t_N[:, None]
        x_NC = (1 - t_N1) * noise_NC + t_N1 * target_NC
        velocity_NC = at_least_float32(self.net(x_NC, TRAINING_STEPS * t_N, z_ND))
        return (target_NC - noise_NC - velocity_NC).square().mean(-1)
