"""What a training run is made of: the configuration every YAML in configs/train fills in. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from arimg.errors import ConfigError
from arimg.home import arimg_home


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    steps: int = 1000
    lr: float = 2e-3
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05      # on tensors of two or more dimensions
    clip_norm: float = 1.0


@dataclass(frozen=True)
class LoopConfig:
    """How a run is carried out; nothing here changes what is learnt, but precision."""

    max_minutes: float = 0.0        # stop (and save) after this long in this session; 0 = no limit
    save_minutes: float = 4.0       # between checkpoints
    save_steps: int = 0             # a checkpoint every so many steps as well; 0 = by time alone
    sample_minutes: float = 8.0     # between sample grids
    log_steps: int = 10
    keep: int = 2                   # checkpoints kept
    precision: str = "no"           # no | bf16 | fp16, as accelerate names them
    compile: bool = False
    ema_decay: float = 0.999        # 0 = no average
    threads: int = 0                # CPU threads; 0 = torch's default


@dataclass(frozen=True)
class EmojiData:
    """A folder made by `arimg data emoji`."""

    folder: str = ""                # default: $ARIMG_HOME/data/emoji-128
    batch_size: int = 16            # per process

    def path(self) -> Path:
        """The folder, default filled in."""
        return Path(self.folder) if self.folder else arimg_home() / "data" / "emoji-128"


@dataclass(frozen=True)
class RunConfig:
    """Fields shared by all objectives; each objective's own config extends it."""

    objective: str = ""
    name: str = ""                  # run folder: $ARIMG_HOME/runs/NAME
    seed: int = 0
    init_from: str = ""             # a pipeline or component folder whose weights start the run
    data: EmojiData = field(default_factory=EmojiData)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name: is empty; give the run a name, for example name=emoji-tokenizer")
        if self.optim.steps <= 0 or self.data.batch_size <= 0:
            raise ConfigError(f"optim.steps={self.optim.steps}, data.batch_size={self.data.batch_size}: "
                              "both must be positive")

    def folder(self) -> Path:
        """The run's folder."""
        return arimg_home() / "runs" / self.name
