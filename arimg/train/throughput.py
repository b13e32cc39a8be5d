"""Whether the loader keeps up with the model: both in samples per second, for one process."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from arimg.devices import find_device, synchronize, training_precision
from arimg.train.objective import Batch, Objective
from arimg.train.run import RunConfig


@dataclass(frozen=True)
class Throughput:
    """Samples per second that are made, and that a training process takes."""

    loader: float
    model: float

    def line(self, config: RunConfig) -> str:
        """One line: what to do, if anything."""
        speeds = (f"the loader makes {self.loader:.1f} samples/s (data.workers={config.data.workers}), the model takes "
                  f"{self.model:.1f}")
        advice = "" if self.loader >= self.model else "; raise data.workers, or cache codes and maps with arimg data"
        return f"{speeds}: {self.loader / self.model:.2f} times as many{advice}"


def measure(config: RunConfig, objective: Objective, batches: int = 10) -> Throughput:
    """Make `batches` micro-batches as training does, then train the networks on the last one as often, in the run's
    precision, without touching the disk. The first of each is not counted."""
    device = find_device("auto")
    batch = objective.batch(0, 0)
    began = time.perf_counter()
    for step in range(1, batches + 1):
        batch = objective.batch(step, 0)
    made = time.perf_counter() - began
    bf16 = training_precision(config.train.precision, device) == "bf16"
    steps = [_train_seconds(objective, tuple(tensor.to(device) for tensor in batch), device, bf16)
             for _ in range(batches + 1)]
    size = config.data.batch_size
    return Throughput(size * batches / made, size * batches / sum(steps[1:]))


def _train_seconds(objective: Objective, batch: Batch, device: torch.device, bf16: bool) -> float:
    """Forward and backward of all networks."""
    networks = {name: player.network.to(device).train() for name, player in objective.players().items()}
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        losses, _ = objective.losses(networks, batch, 0)
    for loss in losses.values():
        loss.backward()
    synchronize(device)
    for network in networks.values():
        network.zero_grad()
    return time.perf_counter() - began
