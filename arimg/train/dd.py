"""What the objectives of Distilled Decoding share: a teacher's pipeline folder, the pairs that it made, and the folder
in which a student can be used: the teacher's own, with the student under `decoders/`.

Nothing of a student's shape is configured: it is its teacher's, token by token or scale by scale, with class or
caption, with control if the pairs have control. The teacher and its control component stay as they are.

Letters as in models/base.py; C latent channels.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from arimg.accel.base import Decoder, DecodeRequest
from arimg.accel.dd1 import unit_ends
from arimg.accel.scale import latent_map
from arimg.accel.target import Target
from arimg.checkpoints import (INDEX, SECOND, find_model, load_component, load_state, read_index, save_component,
                               staged_folder, write_index)
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.models.base import order_of
from arimg.pipeline import Pipeline
from arimg.train.ar import as_condition
from arimg.train.data import processes
from arimg.train.objective import SingleNetwork
from arimg.train.order import EpochOrder
from arimg.train.pairs import PairSet, control_rows, weights_hash
from arimg.train.run import RunConfig

SHOWN = 8               # pictures in a sample grid
_WINDOW = 16            # files of pairs that are shuffled together


@dataclass(frozen=True)
class PairData:
    """Pairs of `arimg data pairs`."""

    folder: str = ""
    batch_size: int = 16            # per micro-batch
    held_out: int = 64              # the last pairs, which are not trained on
    workers: int = 1                # threads per process that draw control maps


@dataclass(frozen=True)
class DDRun(RunConfig):
    """What all runs of Distilled Decoding are told. Raises ConfigError."""

    teacher: str = ""               # pipeline folder
    data: PairData = field(default_factory=PairData)        # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher or not self.data.folder:
            raise ConfigError(f"teacher={self.teacher!r}, data.folder={self.data.folder!r}: give the teacher's "
                              "pipeline folder, and the folder that arimg data pairs made with it")
        if min(self.data.batch_size, self.data.held_out, self.data.workers) < 1:
            raise ConfigError(f"data: batch_size={self.data.batch_size}, held_out={self.data.held_out}, workers="
                              f"{self.data.workers}: all must be at least 1")
        if self.train.sharding != "none":
            raise ConfigError(f"train.sharding={self.train.sharding}: students are trained whole; write sharding=none")


class DDObjective(SingleNetwork):
    """The part of an objective that does not depend on the loss."""

    decoder: ClassVar[str]          # name of the trained network under `decoders/`

    def __init__(self, config: Any) -> None:
        """Raises InputError, CheckpointError and ConfigError on folders that do not fit."""
        self.config = config
        self.pairs = PairSet(Path(config.data.folder).expanduser())
        self.teacher = self._load_teacher()
        self.space = self.teacher.tokenizer.space()
        lanes = processes() * config.train.accumulation
        count = len(self.pairs) - config.data.held_out
        if count < lanes:
            raise ConfigError(f"data.held_out={config.data.held_out}: of {len(self.pairs)} pairs, {count} are left for "
                              f"{lanes} micro-batches per step; make more pairs, or hold out fewer")
        rows = [self.pairs.config.rows(shard) for shard in range(self.pairs.config.shards)]
        sizes = [max(0, min(one.stop, count) - one.start) for one in rows]
        self.pool = ThreadPoolExecutor(config.data.workers, thread_name_prefix="arimg-maps")
        self.order = EpochOrder(sizes, config.seed, lanes, _WINDOW)
        self.held_out = np.arange(count, len(self.pairs))
        torch.manual_seed(config.seed)

    def _load_teacher(self) -> Pipeline:
        """In float32, as the pairs are its own. Raises ConfigError when they are another's."""
        teacher = Pipeline.from_pretrained(self.config.teacher, "cpu", self.pairs.dtype, decoders=())
        if weights_hash(teacher) != self.pairs.teacher:
            raise ConfigError(f"teacher={self.config.teacher}: did not make the pairs in {self.config.data.folder}; "
                              "give the one that did, or make pairs with this one")
        teacher.to(torch.float32)
        for part in (teacher.tokenizer, teacher.transformer, teacher.control):
            if part is not None:
                part.requires_grad_(False)
        return teacher

    @property
    def scales(self) -> bool:
        """Whether the teacher paints scale by scale."""
        return order_of(self.teacher.transformer) == "scales"

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """U+1 numbers: how many tokens the first u units hold."""
        return unit_ends(self.request(*self.conditions(self.held_out[:1])))

    def started(self, network: nn.Module) -> nn.Module:
        """`network` with the weights of the component folder `init_from`, if there is one. Raises CheckpointError."""
        where = self.config.init_from
        if where:
            load_state(network, load_component(where, torch.float32).state_dict(), where)
        return network

    # -----------------------------------------------------------------------------------------------------------------
    # Batches

    def numbers(self, step: int, micro: int) -> np.ndarray:
        """Of the pairs of a micro-batch: every pair once per epoch."""
        size = self.config.data.batch_size
        return self.order.lane(micro, step * size, size)

    def conditions(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """(seeds_B, class_ids_B or caption_BPC) of these pairs, and (maps_B3HW, type_ids_B) if they have control.
        All on the CPU."""
        rows = self.pairs.rows(numbers)
        condition = self.pairs.conditions.condition(rows, self.teacher)
        shown = condition.class_ids_B if condition.caption_BPC is None else condition.caption_BPC
        assert shown is not None
        seeds_B = torch.from_numpy(rows["seed"].astype(np.int64))
        if not self.pairs.conditions.types:
            return seeds_B, shown.cpu()
        drawn = self.pool.map(self._map, numbers, rows["picture"], rows["type_id"])
        return seeds_B, shown.cpu(), torch.cat(list(drawn)), torch.from_numpy(rows["type_id"].astype(np.int64))

    def _map(self, *pair: int) -> Tensor:
        """maps_13HW of the pair of this number, picture and type."""
        return self.pairs.conditions.maps(*(np.array([value]) for value in pair))

    def codes(self, numbers: np.ndarray) -> Tensor:
        """codes_BL, int64: what the teacher made of these pairs' noise."""
        return torch.from_numpy(self.pairs.rows(numbers)["codes"].astype(np.int64))

    def request(self, seeds_B: Tensor, conditions: Tensor, *control: Tensor) -> DecodeRequest:
        """What the teacher was asked for when it made these pairs, on the device of the tensors."""
        if self.teacher.device != seeds_B.device:
            self.teacher.to(seeds_B.device)
            self.space = self.teacher.tokenizer.space()
        inject_KBLD = control_rows(self.teacher, *control) if control else None
        return DecodeRequest(as_condition(conditions), self.pairs.grid, seeds_B, inject_KBLD,
                             self.pairs.config.guidance, self.pairs.config.sampling, self.space)

    def held_out_request(self, device: torch.device, count: int | None = None) -> DecodeRequest:
        """That of the first `count` held-out pairs."""
        return self.request(*(tensor.to(device) for tensor in self.conditions(self.held_out[:count])))

    # -----------------------------------------------------------------------------------------------------------------
    # What a run shows

    def validation_loss(self, network: Any) -> float:
        """See Objective."""
        raise NotImplementedError

    def decoders(self, network: Any) -> Sequence[Decoder]:
        """Those whose pictures are shown."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, network: Any) -> Image.Image:
        """Held-out maps (if any), the teacher's pictures, those of the student; says the validation loss."""
        network.eval()
        device = next(network.parameters()).device
        numbers = self.held_out[:SHOWN]
        request = self.held_out_request(device, SHOWN)
        rows = [self.painted(self.space.codebook_VC[self.codes(numbers).to(device)], request)]
        for decoder in self.decoders(network):
            latents_BLC = decoder.decode(Target(self.teacher.transformer, request), request).latents_BLC
            assert latents_BLC is not None
            rows.append(self.painted(latents_BLC, request))
        maps = self.conditions(numbers)[2:3]
        print(f"validation loss {self.validation_loss(network):.3f}", file=sys.stderr)
        pictures = torch.cat([*maps, *(row.cpu() for row in rows)])
        return make_grid([to_pil(picture) for picture in pictures], columns=len(numbers))

    def painted(self, latents_BLC: Tensor, request: DecodeRequest) -> Tensor:
        """images_B3HW; gradients reach the latents."""
        images_B3HW: Tensor = self.teacher.tokenizer.decode(latent_map(latents_BLC, request.grid, self.space))
        return images_B3HW

    def export(self, network: Any, folder: Path) -> None:
        """The teacher's pipeline folder with the student under `decoders/`."""
        save_beside_teacher(find_model(self.config.teacher), self.trained(network), self.decoder, folder)

    def trained(self, network: Any) -> nn.Module:
        """What is exported of the first network."""
        student: nn.Module = network
        return student


def save_beside_teacher(teacher: Path, student: nn.Module, name: str, folder: Path) -> None:
    """Write the files of a pipeline folder, and `student` as the network of its decoder `name`. Raises
    CheckpointError."""
    with staged_folder(folder, INDEX) as stage:
        shutil.copytree(teacher, stage, dirs_exist_ok=True)
        shutil.rmtree(stage / SECOND / name, ignore_errors=True)
        save_component(student, stage / SECOND / name)
        index = read_index(stage)
        entry = {SECOND + name: ("arimg.hub", type(student).__name__)}
        write_index(stage, replace(index, components={**index.components, **entry}))


def without_dropout(network: nn.Module) -> nn.Module:
    """The same network, which drops nothing in training: a student is to be a function of its noise, and pairs are made
    as many as it needs."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network
