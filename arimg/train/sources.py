"""Where samples come from, behind one small contract: the emoji set, a folder of pictures, tar shards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from arimg.data import load_emoji
from arimg.errors import ConfigError, InputError
from arimg.images import load_image
from arimg.train.data_config import DataConfig

NO_CLASS = -1
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
HELD_OUT = 100          # one sample in so many is held out where no validation folder is given

_PART = 1000            # pictures of a folder that count as one shard
_SHUFFLE = 20           # purpose of a random draw

log = logging.getLogger("arimg")


class CorruptSample(Exception):
    """A sample that cannot be read; the text names shard and key. Caught by the loader, which takes another one."""


class Group(NamedTuple):
    """Consecutive samples that lie together: a shard. Caches have one file per group."""

    name: str
    size: int


class Source(Protocol):
    """Samples 0 .. N-1 in a fixed order, group after group. Reading is thread-safe."""

    groups: Sequence[Group]
    class_names: tuple[str, ...]        # () = not known
    fingerprint: str                    # equal for the same samples in the same order

    def __len__(self) -> int:
        """N."""

    def image(self, index: int) -> Image.Image:
        """The picture, RGB. Raises CorruptSample."""

    def caption(self, index: int) -> str:
        """Its caption, "" where there is none. Raises CorruptSample."""

    def labels(self) -> np.ndarray:
        """int (N,) class ids, NO_CLASS where there is none; may be memory-mapped."""

    def key(self, index: int) -> str:
        """Shard and name of a sample, for messages."""


class EmojiSource:
    """The pictures of a folder made by `arimg data emoji`."""

    def __init__(self, folder: Path) -> None:
        self.emoji = load_emoji(folder)
        self.groups: Sequence[Group] = (Group("emoji", len(self.emoji.images)),)
        self.class_names = self.emoji.class_names
        self.fingerprint = self.emoji.fingerprint

    def __len__(self) -> int:
        return len(self.emoji.images)

    def image(self, index: int) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.emoji.images[index])

    def caption(self, index: int) -> str:
        """The icon's name in words."""
        return self.emoji.names[index].replace("-", " ")

    def labels(self) -> np.ndarray:
        """Class ids."""
        return self.emoji.labels

    def key(self, index: int) -> str:
        """Name of the picture."""
        return self.emoji.names[index]


class FolderSource:
    """FOLDER/CLASS/**/picture: classes are the sub-folders in sorted order, as torchvision's ImageFolder numbers them;
    a caption is the text of a .txt file beside its picture.

    The pictures stand in one shuffled order that depends on their names alone, so that any stretch of it holds all
    classes. Raises InputError when there is no picture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".") \
            if folder.is_dir() else []
        files = [(path.relative_to(folder).as_posix(), number) for number, name in enumerate(classes)
                 for path in sorted((folder / name).rglob("*")) if path.suffix.lower() in PICTURES]
        if not files:
            raise InputError(f"{folder}: holds no pictures in sub-folders; put those of a class into {folder}/CLASS/")
        order = np.random.default_rng([_SHUFFLE]).permutation(len(files))
        self.files = [files[i][0] for i in order]
        self._labels = np.array([files[i][1] for i in order], dtype=np.int32)
        self.class_names = tuple(classes)
        self.groups: Sequence[Group] = [Group(f"part-{start // _PART:05d}", min(_PART, len(files) - start))
                                        for start in range(0, len(files), _PART)]
        self.fingerprint = hashlib.sha256("\n".join(self.files).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """Decode one file. Raises CorruptSample."""
        try:
            return load_image(self.folder / self.files[index])
        except InputError as error:
            raise CorruptSample(f"{self.key(index)}: {error}") from error

    def caption(self, index: int) -> str:
        """The text beside the picture. Raises CorruptSample."""
        path = (self.folder / self.files[index]).with_suffix(".txt")
        try:
            return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptSample(f"{path}: {error}") from error

    def labels(self) -> np.ndarray:
        """Numbers of the sub-folders."""
        return self._labels

    def key(self, index: int) -> str:
        """Path of the picture."""
        return str(self.folder / self.files[index])


@dataclass(frozen=True)
class Split:
    """The samples of a source that belong to training, or to validation."""

    source: Source
    indices: Sequence[int] | np.ndarray

    def group_sizes(self) -> list[int]:
        """Sizes of the stretches of `indices` that lie together; a chosen few are taken as one stretch."""
        if not isinstance(self.indices, range):
            return [len(self.indices)]
        left, sizes = len(self.indices), []
        for group in self.source.groups:
            sizes.append(min(group.size, left))
            left -= sizes[-1]
        return sizes


def open_source(kind: str, folder: Path) -> Source:
    """The source of this kind. Raises InputError."""
    if kind == "emoji":
        return EmojiSource(folder)
    if kind == "folder":
        return FolderSource(folder)
    from arimg.train.shards import ShardSource

    return ShardSource(folder)


def open_splits(config: DataConfig) -> tuple[Split, Split]:
    """(training, held out). Raises InputError, and ConfigError when the two do not have the same classes."""
    source = open_source(config.source, config.path())
    if config.validation:
        held_out = open_source(config.source, Path(config.validation).expanduser())
        if held_out.class_names != source.class_names:
            raise ConfigError(f"data.validation={config.validation}: has other classes than data.folder="
                              f"{config.folder}; give a folder with the same ones")
        return Split(source, range(len(source))), Split(held_out, range(len(held_out)))
    if isinstance(source, EmojiSource):
        marked = source.emoji.held_out
        return Split(source, np.flatnonzero(~marked)), Split(source, np.flatnonzero(marked))
    kept = len(source) - max(1, len(source) // HELD_OUT)
    if not kept:
        raise InputError(f"{config.path()}: holds 1 sample, too few to train on some and validate on others")
    return Split(source, range(kept)), Split(source, range(kept, len(source)))
