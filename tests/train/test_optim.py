"""Parameter groups and learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from arimg.errors import ConfigError, UnknownNameError
from arimg.tokenizers.losses import ImageLossConfig
from arimg.train.optim import build_optimizer, build_schedule, parameter_groups
from arimg.train.run import AdamWConfig, LoopConfig


class Network(nn.Module):
    no_decay = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.zeros(5, 2))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def groups_by_name(config: AdamWConfig) -> dict[str, tuple[float, float]]:
    """(weight decay, learning rate) of each trained parameter."""
    network = Network()
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = [(names[parameter], (group["weight_decay"], group["lr"]))
             for group in parameter_groups(network, config) for parameter in group["params"]]
    assert len(found) == len(dict(found)), "each parameter once"
    return dict(found)


def test_matrices_decay_and_the_rest_does_not() -> None:
    assert groups_by_name(AdamWConfig(lr=1.0, weight_decay=0.1)) == {
        "first.weight": (0.1, 1.0), "second.weight": (0.1, 1.0), "first.bias": (0.0, 1.0), "second.bias": (0.0, 1.0),
        "scale": (0.0, 1.0), "table": (0.0, 1.0)}


def test_learning_rates_by_name() -> None:
    found = groups_by_name(AdamWConfig(lr=1.0, weight_decay=0.1, lr_scales={"first.*": 0.1, "scale": 2.0}))
    assert {name: rate for name, (_, rate) in found.items()} == {
        "first.weight": 0.1, "first.bias": 0.1, "second.weight": 1.0, "second.bias": 1.0, "scale": 2.0, "table": 1.0}


def test_adamw_takes_every_number() -> None:
    optimizer = build_optimizer(Network(), AdamWConfig(beta1=0.8, beta2=0.9, eps=1e-5))
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5 for group in optimizer.param_groups)


def rates(config: AdamWConfig, updates: int, done: int = 0) -> list[float]:
    """The learning rate of each update from `done` on."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    schedule = build_schedule(optimizer, config, updates, done)
    found = []
    for _ in range(done, updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


# Warm-up over 4 updates, then as the name says, written out.
EXPECTED = {
    "constant": lambda t: 1.0,
    "linear": lambda t: (24 - t) / 20,
    "cosine": lambda t: (1 + math.cos(math.pi * (t - 4) / 20)) / 2,
    "decay": lambda t: 0.5 ** (t // 8),
}


@pytest.mark.parametrize("schedule", EXPECTED)
def test_schedules(schedule: str) -> None:
    config = AdamWConfig(lr=2.0, schedule=schedule, warmup_steps=4, decay=0.5, decay_steps=8)
    expected = [2 * (min(1, t / 4) if t < 4 else EXPECTED[schedule](t)) for t in range(24)]
    assert rates(config, 24) == pytest.approx(expected)


def test_vars_schedule() -> None:
    """From 0.005 to 1, flat for a twentieth, then linear to `final`."""
    config = AdamWConfig(lr=1.0, schedule="flat-linear", warmup_steps=10, final=0.1)
    found = rates(config, 110)
    assert found[0] == pytest.approx(0.005) and found[5] == pytest.approx(0.005 + 0.995 / 2)
    assert found[10:16] == [1.0] * 6
    assert found[109] == pytest.approx(0.1 + 0.9 * 0.01 / 0.95)
    steps = [left - right for left, right in zip(found[16:], found[17:])]
    assert steps == pytest.approx([0.9 / 95] * len(steps))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "flat-linear", "decay"])
def test_a_resumed_schedule_goes_on(schedule: str) -> None:
    config = AdamWConfig(schedule=schedule, warmup_steps=4, decay_steps=5)
    assert rates(config, 20, done=7) == rates(config, 20)[7:]


@pytest.mark.parametrize("make, error, message", [
    (lambda: AdamWConfig(schedule="cosin"), UnknownNameError, "did you mean cosine"),
    (lambda: AdamWConfig(schedule="decay"), ConfigError, "decay_steps=0.*positive"),
    (lambda: AdamWConfig(final=-0.1), ConfigError, "optim.final=-0.1: must be at least 0"),
    (lambda: AdamWConfig(decay=-3.0), ConfigError, "optim.decay=-3.0: must be at least 0"),
    (lambda: AdamWConfig(lr_scales={"first.*": -1.0}), ConfigError, r"optim.lr_scales.first.\*=-1.0: must be a finite"),
    (lambda: ImageLossConfig(l1=-1.0), ConfigError, "loss.l1=-1.0: must be a finite number from 0 on"),
    (lambda: LoopConfig(precision="fp16"), UnknownNameError, "unknown precision 'fp16'; did you mean bf16"),
    (lambda: LoopConfig(sharding="fsdp"), UnknownNameError, "did you mean fsdp2"),
    (lambda: LoopConfig(trackers=("tensorbord",)), UnknownNameError, "did you mean tensorboard"),
    (lambda: LoopConfig(accumulation=0), ConfigError, "accumulation=0.*at least 1"),
    (lambda: parameter_groups(Network(), AdamWConfig(lr_scales={"frist.*": 0.1})), UnknownNameError,
     r"unknown parameter in lr_scales 'frist\.\*'; did you mean first"),
    (lambda: parameter_groups(nn.Sequential(*[nn.Linear(1, 1) for _ in range(30)]), AdamWConfig(lr_scales={"x": 0.1})),
     UnknownNameError, "unknown parameter in lr_scales 'x'; known: 0.bias, .* and 20 more$"),
])
def test_faults_are_one_line(make, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
