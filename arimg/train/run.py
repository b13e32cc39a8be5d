"""What a training run is made of: the configuration every YAML in configs/train fills in. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from arimg.errors import ConfigError, UnknownNameError
from arimg.home import arimg_home
from arimg.train.data_config import DataConfig

SCHEDULES = ("constant", "cosine", "linear", "flat-linear", "decay")
PRECISIONS = ("no", "bf16")
SHARDINGS = ("none", "fsdp2")
TRACKERS = ("tensorboard", "wandb")
_MOST_THREADS = 1024


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and its learning rate, as train/optim.py builds them. Raises ConfigError, UnknownNameError."""

    lr: float = 2e-3
    schedule: str = "cosine"        # constant | cosine | linear (both to 0) | flat-linear (VAR's) | decay
    warmup_steps: int = 50          # linear, from 0
    final: float = 0.0              # flat-linear: where it ends, as a share of lr
    decay: float = 0.5              # decay: factor ...
    decay_steps: int = 0            # ... applied every so many steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05      # on tensors of two or more dimensions
    clip_norm: float = 1.0          # of the gradient; 0 = not clipped
    lr_scales: dict[str, float] = field(default_factory=dict)   # parameter name pattern -> factor of its learning rate

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_ranges("optim", self, {"lr": (0, inf), "warmup_steps": (0, inf), "beta1": (0, 1), "beta2": (0, 1),
                                      "eps": (0, 1), "weight_decay": (0, inf), "clip_norm": (0, inf),
                                      "final": (0, inf), "decay": (0, inf), "decay_steps": (0, inf)})
        for pattern, scale in self.lr_scales.items():
            if not 0 <= scale < inf:
                raise ConfigError(f"optim.lr_scales.{pattern}={scale}: must be a finite number from 0 on")
        if self.schedule == "decay" and self.decay_steps <= 0:
            raise ConfigError(f"decay_steps={self.decay_steps}: schedule decay multiplies the learning rate by "
                              f"{self.decay} every decay_steps; write a positive number, for example those of an epoch")


@dataclass(frozen=True)
class OptimConfig(AdamWConfig):
    """The first network's optimiser, and how long the run is."""

    steps: int = 1000


@dataclass(frozen=True)
class LoopConfig:
    """How a run is carried out. Nothing here changes what is learnt, but precision and the number of micro-batches of
    a step: processes * accumulation. Raises ConfigError, UnknownNameError."""

    accumulation: int = 1           # micro-batches per process and step
    max_minutes: float = 0.0        # stop (and save) after this long in this session; 0 = no limit
    save_minutes: float = 4.0       # between checkpoints; 0 = by save_steps alone
    save_steps: int = 0             # a checkpoint every so many steps as well; 0 = by time alone
    sample_minutes: float = 8.0     # between sample grids; 0 = at the end alone
    validate_steps: int = 0         # between validation losses in the log; 0 = none
    log_steps: int = 10
    keep: int = 2                   # checkpoints kept
    precision: str = "no"           # no | bf16 (autocast), as accelerate names them
    compile: bool = False
    checkpoint_blocks: bool = False     # recompute the blocks in the backward pass: less memory, a third more time
    sharding: str = "none"          # none (DDP) | fsdp2: parameters, gradients, optimiser split over the processes
    ema_decay: float = 0.999        # 0 = no average
    threads: int = 0                # CPU threads; 0 = torch's default
    trackers: tuple[str, ...] = ()  # tensorboard, wandb
    log_data: bool = False          # log a checksum of the data of each logged step

    def __post_init__(self) -> None:
        if min(self.accumulation, self.keep, self.log_steps) < 1:
            raise ConfigError(f"train: accumulation={self.accumulation}, keep={self.keep}, log_steps="
                              f"{self.log_steps}: each must be at least 1")
        _check_ranges("train", self, {"max_minutes": (0, inf), "save_minutes": (0, inf), "save_steps": (0, inf),
                                      "sample_minutes": (0, inf), "validate_steps": (0, inf), "ema_decay": (0, 1),
                                      "threads": (0, _MOST_THREADS)})
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("sharding", self.sharding, SHARDINGS)
        for name in self.trackers:
            _check_choice("tracker", name, TRACKERS)


def _check_ranges(section: str, config: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raises ConfigError for a value that is not in its [low, high)."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value < high:
            bound = "" if high == inf else f" and below {high}"
            raise ConfigError(f"{section}.{name}={value}: must be at least {low}{bound}")


def _check_choice(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnknownNameError(kind, name, known)


@dataclass(frozen=True)
class RunConfig:
    """Fields shared by all objectives; each objective's own config extends it. A resumed run may differ from its
    checkpoint in FREE alone."""

    FREE: ClassVar[tuple[str, ...]] = ("name", "init_from", "data.workers", "optim.steps", "train", "settings")

    objective: str = ""
    name: str = ""                  # run folder: $ARIMG_HOME/runs/NAME
    seed: int = 0
    init_from: str = ""             # a pipeline or component folder whose weights start the run
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name: is empty; give the run a name, for example name=emoji-tokenizer")
        if self.name != Path(self.name).name or self.name == "..":
            raise ConfigError(f"name={self.name}: names a folder below $ARIMG_HOME/runs; write it without slashes")
        if not 0 <= self.seed < 2 ** 32:
            raise ConfigError(f"seed={self.seed}: must be a whole number from 0 to 2^32 - 1")
        if self.optim.steps <= 0:
            raise ConfigError(f"optim.steps={self.optim.steps}: must be positive")

    def folder(self) -> Path:
        """The run's folder."""
        return arimg_home() / "runs" / self.name
