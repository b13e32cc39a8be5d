"""The `data` section of a training run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from arimg.errors import ConfigError, UnknownNameError
from arimg.home import arimg_home

SOURCES = ("emoji", "folder", "shards")
CROPS = ("center", "ten", "random", "window")
ORDERS = ("", "epochs", "balanced")


@dataclass(frozen=True)
class CropConfig:
    """How a picture of any size becomes a square one (train/crops.py)."""

    kind: str = "center"            # center | ten | random | window
    size: int = 0                   # pixels; 0 = that of the emoji pictures
    ratios: tuple[float, ...] = (1.1,)      # ten: the crops are cut from a centre square this much larger
    count: int = 10                 # random: crops per picture in a cache; without a cache every one is new

    def __post_init__(self) -> None:
        if self.kind not in CROPS:
            raise UnknownNameError("crop", self.kind, CROPS)
        if self.size < 0 or self.count < 1 or not self.ratios or min(self.ratios) < 1:
            raise ConfigError(f"data.crop: size={self.size}, count={self.count}, ratios={list(self.ratios)}: size is "
                              "not negative, count at least 1, and ratios at least 1.0")


@dataclass(frozen=True)
class BucketConfig:
    """Sizes of multi-resolution training: all heights and widths in these bounds, one of them for each micro-batch."""

    min_side: int = 384             # pixels
    max_side: int = 1024
    step: int = 16                  # sides are multiples of it
    max_tokens: int = 2304

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.min_side <= self.max_side or self.min_side % self.step:
            raise ConfigError(f"data.buckets: step={self.step}, min_side={self.min_side}, max_side={self.max_side}: "
                              "give step <= min_side <= max_side, and min_side a multiple of step")


@dataclass(frozen=True)
class DataConfig:
    """What a run reads, and in which order.

    emoji: a folder made by `arimg data emoji`. folder: one sub-folder of pictures per class. shards: tar files in the
    WebDataset layout, indexed by `arimg data index`.
    """

    source: str = "emoji"
    folder: str = ""                # emoji: default $ARIMG_HOME/data/emoji-128
    validation: str = ""            # held-out pictures in the same form; "": the marked emoji, else the last hundredth
    batch_size: int = 16            # per micro-batch; a step has processes x accumulation of them
    order: str = ""                 # epochs | balanced (with replacement, classes by sqrt of size); "": balanced emoji
    window: int = 16                # shards whose samples are shuffled together
    workers: int = 1                # threads per process that read, decode, crop and draw maps
    crop: CropConfig = field(default_factory=CropConfig)
    buckets: BucketConfig | None = None
    cache: str = ""                 # folder of codes, maps and captions made by `arimg data`; "": made on the fly

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UnknownNameError("data.source", self.source, SOURCES)
        if self.order not in ORDERS:
            raise UnknownNameError("data.order", self.order, ORDERS[1:])
        if min(self.batch_size, self.window, self.workers) < 1:
            raise ConfigError(f"data: batch_size={self.batch_size}, window={self.window}, workers={self.workers}: all "
                              "must be at least 1")
        if self.source != "emoji":
            self._check_pictures()
        elif self.buckets or self.cache:
            raise ConfigError("data.source=emoji: its pictures are of one size and keep their codes beside them; leave "
                              "data.buckets and data.cache out")

    def _check_pictures(self) -> None:
        if not self.folder:
            raise ConfigError(f"data.folder: is empty; give the folder of the {self.source}, data.folder=FOLDER")
        if not self.crop.size:
            raise ConfigError("data.crop.size: is 0; pictures come in all sizes, so give the side in pixels, for "
                              "example data.crop.size=256")
        if self.buckets and self.cache:
            raise ConfigError("data.buckets: sizes are drawn anew in every step, so that no cache fits; write "
                              "data.cache=''")

    @property
    def balanced(self) -> bool:
        """Whether samples are drawn by class instead of walked through in epochs."""
        return self.order == "balanced" or (not self.order and self.source == "emoji")

    def path(self) -> Path:
        """The folder, default filled in."""
        return Path(self.folder).expanduser() if self.folder else arimg_home() / "data" / "emoji-128"
