"""Toy networks of continuous tokens with random weights that matter, and their inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.models.base import Condition
from arimg.models.causal import CausalConfig, CausalTransformer
from arimg.models.diffusion_head import HeadConfig
from arimg.models.mar import MARConfig, MARTransformer

CLASSES, SIDE = 3, 4
HEAD = HeadConfig(width=16, layers=1, steps="ddim5")     # begins at t = 800: an untrained head does not blow up there
MAR = dict(latent_channels=4, grid=SIDE, encoder_dim=32, encoder_layers=2, encoder_heads=4, decoder_dim=32,
           decoder_layers=2, decoder_heads=4, buffer=3, num_classes=CLASSES, inject_encoder=(0,), inject_decoder=(0, 1))
CAUSAL = dict(latent_channels=4, grid=SIDE, dim=32, layers=3, heads=4, ffn_hidden=48, prefix_rows=2,
              num_classes=CLASSES, inject_layers=(0, 1, 2))


def scrambled(network: Any, seed: int) -> Any:
    """In eval mode, float64; weights N(0, 0.2^2), norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(module.weight) for module in network.modules() if isinstance(module, nn.LayerNorm)}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if id(parameter) in norms or name.endswith("norm.weight") else noise)
    return network.eval().double()


def nearby(network: Any, distance: float = 3e-5, seed: int = 7) -> Any:
    """A draft: the same network with weights slightly off, so that some drafts are kept and some are not."""
    generator, draft = torch.Generator().manual_seed(seed), copy.deepcopy(network)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return draft


def toy_mar(seed: int = 0, head: HeadConfig = HEAD, **changes: Any) -> MARTransformer:
    """A MAR of 4x4 tokens of 4 channels with three injection points."""
    network: MARTransformer = scrambled(MARTransformer(MARConfig(**{**MAR, "head": head, **changes})), seed)
    return network


def toy_causal(seed: int = 0, head: HeadConfig = HEAD, **changes: Any) -> CausalTransformer:
    """The same for the causal model."""
    network: CausalTransformer = scrambled(CausalTransformer(CausalConfig(**{**CAUSAL, "head": head, **changes})), seed)
    return network


def toy_request(batch: int = 3, control: bool = False, cfg: float = 1.0, control_cfg: float | None = None,
                seed: int = 0, temperature: float = 1.0, **options: Any) -> DecodeRequest:
    """Pictures with seeds 0, 1, 2, ... of classes 0, 1, 2, 0, ..."""
    condition = Condition(class_ids_B=torch.arange(batch) % CLASSES)
    inject = toy_inject(batch) if control else None
    return DecodeRequest(condition, (SIDE, SIDE), torch.arange(batch) + seed, inject, Guidance(cfg, control_cfg),
                         Sampling(temperature), **options)


def toy_inject(batch: int, seed: int = 3) -> Tensor:
    """inject_KBLD; row b does not depend on the batch."""
    generators = [torch.Generator().manual_seed(seed + b) for b in range(batch)]
    rows = [torch.randn(3, SIDE ** 2, 32, generator=one, dtype=torch.float64) for one in generators]
    return torch.stack(rows, dim=1)


def one_of(request: DecodeRequest, j: int) -> DecodeRequest:
    """Picture j of a request alone."""
    assert request.condition.class_ids_B is not None
    inject = None if request.inject_KBLD is None else request.inject_KBLD[:, j:j + 1]
    forced = None if request.forced_BLC is None else request.forced_BLC[j:j + 1]
    return replace(request, condition=Condition(class_ids_B=request.condition.class_ids_B[j:j + 1]),
                   seeds_B=request.seeds_B[j:j + 1], inject_KBLD=inject, forced_BLC=forced)
