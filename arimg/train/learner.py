"""One network under training: its place on the devices, optimiser, schedule, average of weights, and their state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arimg.train.objective import Player
from arimg.train.optim import build_optimizer, build_schedule
from arimg.train.run import LoopConfig
from arimg.train.sharding import checkpoint_blocks, shard, split_like, whole
from arimg.weights import check_keys

_EMA_POWER = 0.75       # of the average's warm-up: early weights are forgotten fast

State = dict[str, dict[str, Any]]


class Learner:
    """A player of an objective on the machines of this run.

    `network` is to be called (several processes, autocast, torch.compile); `module` is the bare network.
    """

    def __init__(self, accelerator: Accelerator, player: Player, config: LoopConfig) -> None:
        self.player = player
        self.module = player.network
        self.updates = 0
        self.twin: nn.Module | None = None      # a whole network, where the one in training is split
        if config.checkpoint_blocks:
            checkpoint_blocks(self.module)
        if config.sharding == "fsdp2":
            self.twin = copy.deepcopy(self.module).cpu().requires_grad_(False)
            shard(self.module, accelerator.device)
        self.network: nn.Module = accelerator.prepare_model(self.module, evaluation_mode=self.twin is not None)
        if config.compile:
            self.network = torch.compile(self.network)      # type: ignore[assignment]
        self.optimizer = build_optimizer(self.module, player.optim)
        self.schedule = build_schedule(self.optimizer, player.optim, player.updates)
        self.ema = self._new_average(config.ema_decay) if player.averaged and config.ema_decay else None

    def _new_average(self, decay: float) -> Any:
        from diffusers.training_utils import EMAModel

        return EMAModel(self.module.parameters(), decay=decay, use_ema_warmup=True, power=_EMA_POWER,
                        foreach=self.twin is None and next(self.module.parameters()).is_cuda)

    def update(self) -> Tensor:
        """Clip, step, average. Returns the gradient's norm before clipping."""
        limit = self.player.optim.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.updates += 1
        if self.ema is not None:
            self.ema.step(self.module.parameters())
        return whole(norm) if self.twin is not None else norm

    def renew(self) -> None:
        """Go on from the average of the weights."""
        if self.ema is not None and self.updates:
            self.ema.copy_to(self.module.parameters())

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """A whole network with the averaged weights (the plain ones without an average), for as long as the block
        lasts. All processes must enter at once."""
        average = self.ema if self.ema is not None and self.updates else None
        if self.twin is not None:
            state = self.weights()
            if average is not None:
                state |= self._by_name(average.shadow_params)
            self.twin.load_state_dict(state)
            device = next(self.module.parameters()).device
            try:
                yield self.twin.to(device)
            finally:
                self.twin.cpu()
        elif average is not None:
            average.store(self.module.parameters())
            try:
                average.copy_to(self.module.parameters())
                yield self.module
            finally:
                average.restore(self.module.parameters())
        else:
            yield self.module

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict, on the CPU. All processes must ask at once."""
        return {name: whole(tensor) for name, tensor in self.module.state_dict().items()}

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Whole tensors, one per parameter."""
        names = (name for name, _ in self.module.named_parameters())
        return {name: whole(tensor) for name, tensor in zip(names, tensors, strict=True)}

    def _trained(self) -> dict[str, nn.Parameter]:
        """The optimiser's parameters, in its order."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return {names[parameter]: parameter for group in self.optimizer.param_groups for parameter in group["params"]}

    def state(self) -> State:
        """All that the next updates depend on, whole, by parameter names: it does not tell how many processes there
        were. All processes must ask at once."""
        moments = {name: {key: whole(value) for key, value in self.optimizer.state[parameter].items()}
                   for name, parameter in self._trained().items() if parameter in self.optimizer.state}
        average = self.ema and {"updates": self.ema.optimization_step,
                                "weights": self._by_name(self.ema.shadow_params)}
        return {"weights": self.weights(), "optimizer": {"updates": self.updates, "moments": moments},
                "average": average or {}}

    def load(self, state: State, source: str) -> None:
        """Go on from a state. An average that it lacks starts from its weights. Raises CheckpointError."""
        current = self.module.state_dict()
        check_keys(current, state["weights"], source, "resume with the config that it was trained with")
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(split_like(state["weights"][name], tensor))
        self._load_optimizer(state["optimizer"]["moments"])
        self.updates = state["optimizer"]["updates"]
        self.schedule = build_schedule(self.optimizer, self.player.optim, self.player.updates, self.updates)
        if self.ema is not None:
            saved = state["average"].get("weights", {})
            self.ema.optimization_step = state["average"].get("updates", 0)
            self.ema.shadow_params = [split_like(saved[name], parameter) if saved else parameter.detach().clone()
                                      for name, parameter in self.module.named_parameters()]

    def _load_optimizer(self, moments: dict[str, dict[str, Tensor]]) -> None:
        trained = self._trained()
        by_number = {number: {key: split_like(value, trained[name]) if value.ndim else value
                              for key, value in moments[name].items()}
                     for number, name in enumerate(trained) if name in moments}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": by_number, "param_groups": groups})
