"""Optimisers, learning-rate schedules and averages of weights."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from arimg.errors import UnknownNameError
from arimg.train.run import AdamWConfig

_WARM_UP_FROM = 0.005       # flat-linear: share of the learning rate at the first step
_FLAT = 0.05                # flat-linear: share of the steps before the decay


def parameter_groups(network: nn.Module, config: AdamWConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors and scalars do not (LlamaGen's rule), nor do parameters whose dotted name has one of the
    parts in `network.no_decay`; learning rates follow `lr_scales`. Every trainable parameter is in exactly one group.

    Raises UnknownNameError when a pattern in `lr_scales` fits no parameter.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    for pattern in config.lr_scales:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise UnknownNameError("parameter in lr_scales", pattern, trained)
    spared = set(getattr(network, "no_decay", ()))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decays = parameter.ndim >= 2 and spared.isdisjoint(name.split("."))
        scale = next((s for pattern, s in config.lr_scales.items() if fnmatchcase(name, pattern)), 1.0)
        groups.setdefault((config.weight_decay if decays else 0.0, scale), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay, "lr": config.lr * scale}
            for (decay, scale), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)]


def build_optimizer(network: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in network.parameters())
    return torch.optim.AdamW(parameter_groups(network, config), betas=(config.beta1, config.beta2), eps=config.eps,
                             fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, config: AdamWConfig, updates: int, done: int = 0) -> LambdaLR:
    """The learning rates of `updates` updates, `done` of which lie behind: a function of their number alone."""
    from diffusers.optimization import get_scheduler

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    if config.schedule == "flat-linear":
        return LambdaLR(optimizer, lambda step: flat_linear(step, config, updates), last_epoch=done - 1)
    if config.schedule == "decay":
        return LambdaLR(optimizer, lambda step: warm_up(step, config) * config.decay ** (step // config.decay_steps),
                        last_epoch=done - 1)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule: LambdaLR = get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps,
                                       num_training_steps=updates, last_epoch=done - 1)
    return schedule


def warm_up(step: int, config: AdamWConfig) -> float:
    """Share of the learning rate: linear from 0 to 1."""
    return step / config.warmup_steps if step < config.warmup_steps else 1.0


def flat_linear(step: int, config: AdamWConfig, updates: int) -> float:
    """VAR's schedule (Tian et al. 2024, published recipe): after the warm-up flat for a twentieth of the updates, then
    linear to `final`."""
    if step < config.warmup_steps:
        return _WARM_UP_FROM + (1 - _WARM_UP_FROM) * step / config.warmup_steps
    passed = (step - config.warmup_steps) / max(1, updates - config.warmup_steps)
    return 1 - (1 - config.final) * max(0.0, passed - _FLAT) / (1 - _FLAT)
