"""Pairs of noise and codes, the data of Distilled Decoding 1 (Liu et al. 2024, arXiv:2412.17153, section 3.1): what the
teacher's flow makes of a picture's noise (accel/verify.py: FlowAR), under a class or a caption and, if it takes one, a
control map.

A folder holds `pairs.json` (the configuration, and what the teacher is) and shards `pairs-00000.npy` of records
(seed, class_id, picture, type_id, codes). Noise is not stored: it follows from the seed; nor are maps: picture, type
and the pair's number make them again. Where the teacher reads captions, class_id is the number of a caption. Pair k
depends on the configuration and on k alone, and a shard is written whole or not at all, so that a run can be killed at
any time, go on, or be shared by several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling, token_scales
from arimg.accel.flow import FlowNoise, FlowSolver
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR, FlowScales
from arimg.config import from_dict, to_dict
from arimg.control.base import get_type
from arimg.data import EmojiSet, load_emoji, to_images
from arimg.errors import ArimgError, ConfigError, InputError
from arimg.models.base import Condition, order_of
from arimg.pipeline import Pipeline
from arimg.train.data import balanced_indices
from arimg.train.maps import random_map

MANIFEST = "pairs.json"
NOTHING = -1            # picture and type_id of a pair without control


@dataclass(frozen=True)
class PairsConfig:
    """What the pairs are. Raises ConfigError."""

    count: int = 100_000
    seed: int = 0                       # pair k's noise has seed + k
    data: str = ""                      # emoji folder whose classes and maps are the conditions; "" = classes alone
    captions: str = ""                  # text file, a caption a line: the conditions of a teacher that reads them
    guidance: Guidance = Guidance()
    sampling: Sampling = Sampling()
    solver: FlowSolver = FlowSolver()
    batch: int = 32                     # pairs decoded at once
    shard: int = 1024                   # pairs per file

    def __post_init__(self) -> None:
        for name in ("count", "batch", "shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: needs a whole number >= 1")
        if not 0 <= self.seed <= 2 ** 63 - self.count:
            raise ConfigError(f"seed {self.seed}: seeds of pairs are whole numbers from 0 to 2**63 - 1; give a smaller "
                              "one, for example 0")

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.count // self.shard)

    def rows(self, shard: int) -> range:
        """Numbers of the pairs in a file."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.count))


def record(length: int) -> np.dtype:
    """One pair."""
    return np.dtype([("seed", "<i8"), ("class_id", "<i4"), ("picture", "<i4"), ("type_id", "<i2"),
                     ("codes", "<u2", (length,))])


@dataclass(frozen=True)
class Conditions:
    """What pairs are conditioned on; every draw is a function of (seed, number of the pair)."""

    config: PairsConfig
    classes: int                        # or captions
    types: tuple[str, ...]              # of control maps; () = none

    @cached_property
    def emoji(self) -> EmojiSet | None:
        """The pictures, if there are any."""
        return load_emoji(Path(self.config.data)) if self.config.data else None

    @cached_property
    def captions(self) -> list[str]:
        """Of the file, if there is one."""
        return read_captions(self.config.captions) if self.config.captions else []

    def condition(self, records: np.ndarray, teacher: Pipeline) -> Condition:
        """The class or caption of each record, on the teacher's device."""
        class_ids = records["class_id"].astype(np.int64)
        if not self.captions:
            return Condition(class_ids_B=torch.from_numpy(class_ids).to(teacher.device))
        assert teacher.text is not None
        length = teacher.transformer.config.caption_length
        return teacher.text([self.captions[line] for line in class_ids], length)

    def draw(self, numbers: np.ndarray) -> np.ndarray:
        """(N, 3) class id, picture and type id of each pair. Of N pictures, picture N+i is the mirror image of i; only
        those for training are drawn."""
        return np.array([self._draw(np.random.default_rng([self.config.seed, 4, number])) for number in numbers])

    def _draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        if self.emoji is None:
            return int(rng.integers(self.classes)), NOTHING, NOTHING
        training = np.flatnonzero(~self.emoji.held_out)
        picture = int(training[balanced_indices(self.emoji.labels[training], 1, rng)[0]])
        mirrored = picture + len(self.emoji.images) * int(rng.random() < 0.5)
        type_id = int(rng.integers(len(self.types))) if self.types else NOTHING
        return int(self.emoji.labels[picture]), mirrored, type_id

    def maps(self, numbers: np.ndarray, pictures: np.ndarray, type_ids: np.ndarray) -> Tensor:
        """maps_B3HW in [-1, 1] of pairs with control."""
        assert self.emoji is not None
        count, maps = len(self.emoji.images), []
        for number, picture, type_id in zip(numbers, pictures, type_ids):
            pixels = self.emoji.images[picture % count]
            rng = np.random.default_rng([self.config.seed, 5, number])
            maps.append(random_map(self.types[type_id], pixels[:, ::-1] if picture >= count else pixels, rng))
        return to_images(np.stack(maps))


def read_captions(path: str) -> list[str]:
    """The lines of a text file that say something. Raises InputError."""
    try:
        captions = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"captions {path}: cannot be read ({type(error).__name__}); give a text file, a caption a "
                         "line") from error
    if not captions:
        raise InputError(f"captions {path}: the file is empty; write a caption a line")
    return captions


@torch.no_grad()
def control_rows(teacher: Pipeline, maps_B3HW: Tensor, type_ids_B: Tensor) -> Tensor:
    """inject_KBLD of maps in [-1, 1], as the pipeline itself makes it."""
    control, scales = teacher.control, teacher.tokenizer.space().scales
    maps_B3HW, type_ids_B = maps_B3HW.to(teacher.device, teacher.dtype), type_ids_B.to(teacher.device)
    with torch.autocast(teacher.device.type, enabled=False):
        resample = get_type(teacher.control_types[0]).resample
        inject_KBLD: Tensor = control.inject(maps_B3HW, resample, type_ids_B, scales)
    return inject_KBLD


class PairMaker:
    """Makes shards with a teacher. Raises InputError on conditions that it does not take and on too many codes."""

    def __init__(self, teacher: Pipeline, config: PairsConfig) -> None:
        network = teacher.transformer
        if order_of(network) == "continuous":
            raise InputError("this teacher paints continuous tokens, and the flow of pairs leads to code vectors; give "
                             "a teacher whose tokenizer has a codebook")
        self._check_conditions(teacher, config)
        if network.vocab_size > 2 ** 16:
            raise InputError(f"a teacher of {network.vocab_size} codes: pairs hold codes below {2 ** 16}")
        self.teacher, self.config = teacher, config
        self.grid = (teacher.settings.size[0] // teacher.tokenizer.stride,
                     teacher.settings.size[1] // teacher.tokenizer.stride)
        types = teacher.control_types if config.data and teacher.control is not None else ()
        classes = len(read_captions(config.captions)) if config.captions else network.config.num_classes
        self.conditions = Conditions(config, classes, types)

    def _check_conditions(self, teacher: Pipeline, config: PairsConfig) -> None:
        reads_captions = teacher.transformer.config.conditioning == "text"
        if reads_captions and (not config.captions or config.data or teacher.text is None):
            raise InputError("this teacher takes captions: give a text file with one a line, --captions FILE, no "
                             "--data, and a model folder with its text encoder")
        if config.captions and not reads_captions:
            raise InputError(f"captions {config.captions}: this teacher takes classes; leave the file out")

    def manifest(self) -> dict[str, Any]:
        """Everything that the pairs depend on."""
        emoji, captions = self.conditions.emoji, "\n".join(self.conditions.captions)
        return {"config": to_dict(self.config), "teacher": weights_hash(self.teacher), "grid": list(self.grid),
                "dtype": str(self.teacher.dtype).removeprefix("torch."), "classes": self.conditions.classes,
                "types": list(self.conditions.types), "data": emoji.fingerprint if emoji else None,
                "captions": hashlib.sha256(captions.encode()).hexdigest()[:16]}

    def shard(self, number: int) -> np.ndarray:
        """The records of one file."""
        rows = np.arange(self.config.rows(number).start, self.config.rows(number).stop)
        return np.concatenate([self.batch(rows[first:first + self.config.batch])
                               for first in range(0, len(rows), self.config.batch)])

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        """Records of the pairs of these numbers."""
        drawn = self.conditions.draw(numbers)
        records = np.zeros(len(numbers), record(self._length))
        records["seed"] = self.config.seed + numbers
        records["class_id"], records["picture"], records["type_id"] = drawn.T
        request = self._request(numbers, records)
        network = self.teacher.transformer
        flow = FlowAR if order_of(network) == "raster" else FlowScales
        codes_BL = flow(self.config.solver).decode(Target(network, request), request).codes_BL
        assert codes_BL is not None
        records["codes"] = codes_BL.cpu().numpy()
        return records

    @property
    def _length(self) -> int:
        return sum(height * width for height, width in token_scales(self.teacher.tokenizer.space(), self.grid))

    def _request(self, numbers: np.ndarray, records: np.ndarray) -> DecodeRequest:
        inject_KBLD = None
        if self.conditions.types:
            maps_B3HW = self.conditions.maps(numbers, records["picture"], records["type_id"])
            type_ids_B = torch.from_numpy(records["type_id"].astype(np.int64))
            inject_KBLD = control_rows(self.teacher, maps_B3HW, type_ids_B)
        return DecodeRequest(self.conditions.condition(records, self.teacher), self.grid,
                             torch.from_numpy(records["seed"].astype(np.int64)).to(self.teacher.device), inject_KBLD,
                             self.config.guidance, self.config.sampling, self.teacher.tokenizer.space())


def make_pairs(maker: PairMaker, folder: Path, part: int = 0, parts: int = 1,
               progress: Callable[[int], None] = lambda pairs: None) -> float:
    """Write the shards that are missing, of `parts` equal parts number `part`. Returns pairs per second (0: none made).

    Several processes may write one folder, each its own part. Raises InputError when the folder holds other pairs.
    """
    if not 0 <= part < parts:
        raise InputError(f"part {part + 1}/{parts}: give a number from 1 to {parts}")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, maker.manifest())
    began, made = time.perf_counter(), 0
    for number in range(part, maker.config.shards, parts):
        path = shard_path(folder, number)
        if not path.exists():
            records = maker.shard(number)
            temporary = path.with_suffix(".writing")
            with temporary.open("wb") as stream:
                np.save(stream, records)
            temporary.rename(path)
            made += len(records)
        progress(len(maker.config.rows(number)))
    return made / (time.perf_counter() - began)


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that it is the one that is there."""
    path, text = folder / MANIFEST, json.dumps(manifest, indent=2) + "\n"
    if not path.exists():
        temporary = folder / f"{MANIFEST}.{os.getpid()}.writing"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder}: holds pairs of another teacher or configuration (see {MANIFEST} there); "
                         "give another folder")


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"pairs-{number:05d}.npy"


def weights_hash(teacher: Pipeline) -> str:
    """Hexadecimal digest of the weights that decide the codes, as they are computed with."""
    digest = hashlib.sha256()
    for part in (teacher.transformer, teacher.control):
        for key, tensor in sorted(part.state_dict().items()) if part is not None else ():
            values = tensor.detach().cpu().float().contiguous().numpy()
            digest.update(f"{key} {tensor.dtype}".encode() + values.tobytes())
    digest.update(teacher.tokenizer.space().codebook_VC.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_shard(path: Path) -> np.ndarray:
    try:
        records: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: is damaged; delete it, and the same arimg data pairs command makes it again") \
            from error
    return records


class PairSet:
    """The pairs of a folder, memory-mapped. Raises InputError when it is not complete or damaged."""

    def __init__(self, folder: Path) -> None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.config = from_dict(PairsConfig, manifest["config"])
            self.grid = (manifest["grid"][0], manifest["grid"][1])
            self.teacher, self.dtype = str(manifest["teacher"]), str(manifest["dtype"])
            self.conditions = Conditions(self.config, manifest["classes"], tuple(manifest["types"]))
        except ArimgError as error:
            raise InputError(f"{folder / MANIFEST}: {error}") from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{folder}: holds no pairs ({type(error).__name__}); make them with arimg data pairs") \
                from error
        missing = [number for number in range(self.config.shards) if not shard_path(folder, number).exists()]
        if missing:
            raise InputError(f"{folder}: {len(missing)} of {self.config.shards} shards are missing; the same "
                             "arimg data pairs command goes on")
        self.shards = [_load_shard(shard_path(folder, number)) for number in range(self.config.shards)]

    def __len__(self) -> int:
        return self.config.count

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Records of the pairs of these numbers."""
        return np.stack([self.shards[number // self.config.shard][number % self.config.shard] for number in numbers])

    def noise(self, rows: np.ndarray, codebook_VC: Tensor) -> Tensor:
        """noise_BLC that the codes of these records come from."""
        seeds_B = torch.from_numpy(rows["seed"].astype(np.int64))
        positions_BL = torch.arange(rows["codes"].shape[1]).expand(len(rows), -1)
        return FlowNoise(codebook_VC=codebook_VC).latents(seeds_B, positions_BL)
