"""Networks of equal blocks: their parameters split over the processes (FSDP2), their blocks computed again in the
backward pass. On any device: gloo on CPUs takes the same path as NCCL."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from arimg.errors import ConfigError


def block_networks(network: nn.Module) -> list[Any]:
    """The parts of a network that take `checkpoint_blocks`; their blocks are in `layers`."""
    return [module for module in network.modules() if hasattr(module, "checkpoint_blocks")]


def checkpoint_blocks(network: nn.Module) -> None:
    """Recompute blocks in the backward pass. Raises ConfigError when there are none."""
    parts = block_networks(network)
    if not parts:
        raise ConfigError("train.checkpoint_blocks=true: this objective's network has no blocks to recompute; leave it "
                          "out")
    for part in parts:
        part.checkpoint_blocks = True


def shard(network: nn.Module, device: torch.device) -> None:
    """Split the parameters of each block, and of the rest, over all processes. In place. Raises ConfigError."""
    parts = block_networks(network)
    if not parts:
        raise ConfigError("train.sharding=fsdp2: this objective's network has no blocks to split; write sharding=none")
    scalars = [name for name, parameter in network.named_parameters() if not parameter.ndim]
    if scalars:
        raise ConfigError(f"train.sharding=fsdp2: {', '.join(scalars)} is a single number, which FSDP2 cannot split; "
                          "write sharding=none, or model.codebook_dim=null if it is the scale of a tied codebook")
    if not dist.is_initialized():
        raise ConfigError("train.sharding=fsdp2: needs several processes; start them with torchrun --nproc_per_node=N "
                          "-m arimg.train, or write sharding=none")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    network.to(device)
    for part in parts:
        for block in part.layers:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; of a split one, all processes must ask for it at once."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of a parameter of its shape, split as that is."""
    moved = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
