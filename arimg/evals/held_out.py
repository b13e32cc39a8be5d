"""The pictures that a model is measured on: the held-out split of a data set, or a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from arimg import images
from arimg.data import EmojiSet
from arimg.errors import InputError
from arimg.evals.extractors import Extractor
from arimg.evals.picture_sets import SUFFIXES, fingerprint_of
from arimg.evals.report import versions


@dataclass(frozen=True)
class HeldOut:
    """All held-out pictures of a data set, in an order that the seed decides; `count` of them are used."""

    pixels: np.ndarray              # (N, H, W, 3) uint8, all held-out pictures
    class_names: list[str] | None   # (N,) names or ids; None = the pictures have no classes
    count: int
    fingerprint: str
    split: str = "held_out"

    @property
    def chosen(self) -> np.ndarray:
        """The pictures that are used."""
        return self.pixels[:self.count]

    @property
    def chosen_classes(self) -> list[str] | None:
        """Theirs."""
        return None if self.class_names is None else self.class_names[:self.count]


def held_out(emoji: EmojiSet, count: int | None, seed: int = 0) -> HeldOut:
    """`count` held-out pictures; None = all. Raises InputError on a count that the split does not have."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(emoji.held_out))
    count = len(order) if count is None else count
    if not 2 <= count <= len(order):
        raise InputError(f"-n {count}: the data set holds out {len(order)} pictures; give a number from 2 to that")
    names = [emoji.class_names[label] for label in emoji.labels[order]]
    return HeldOut(np.ascontiguousarray(emoji.images[order]), names, count, emoji.fingerprint)


def folder_pictures(folder: Path, size: tuple[int, int], count: int, seed: int = 0) -> HeldOut:
    """`count` pictures below a folder, which the seed chooses, as ADM crops them, all in memory. In a folder of class
    folders, such as ImageNet's validation set, the class id is the place of a picture's folder among them, by name.

    Raises InputError on too few pictures and on a size that is not square.
    """
    if size[0] != size[1]:
        raise InputError(f"the model paints {size[0]}x{size[1]} pixels, and folders of pictures are cropped to "
                         "squares; give a model of a square size")
    found = files_below(folder, count, seed)
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    pixels = np.stack([np.asarray(images.center_crop_adm(images.load_image(path, "picture"), size[0]))
                       for path in bar("pictures")(found)])
    ids = [str(folders.index(path.relative_to(folder).parts[0])) for path in found] if folders else None
    return HeldOut(pixels, ids, len(found), fingerprint_of(found), "folder")


def files_below(folder: Path, count: int | None, seed: int = 0) -> list[Path]:
    """`count` picture files below a folder, which the seed chooses; None = all, by name. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'is a file' if folder.is_file() else 'no such folder'}; give one with pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no picture below it ({', '.join(SUFFIXES)}); give a folder that holds some")
    if count is None:
        return found
    if not 2 <= count <= len(found):
        raise InputError(f"-n {count}: {folder} holds {len(found)} pictures; give a number from 2 to that")
    return [found[k] for k in np.random.default_rng(seed).permutation(len(found))[:count]]


def bar(title: str) -> Callable[[Iterable], Iterable]:
    """A progress bar on stderr around an iteration."""
    def wrap(items: Iterable) -> Any:
        return tqdm(items, desc=title, file=sys.stderr, leave=False)
    return wrap


def protocol(what: str, data: HeldOut, extractor: Extractor, seed: int, **more: Any) -> dict[str, Any]:
    """What every report on held-out pictures says of its making."""
    return {"evaluation": what, "versions": versions(), "data": data.fingerprint, "split": data.split,
            "reference_pictures": len(data.pixels), "pictures": data.count, "seed": seed,
            "extractor": extractor.describe(), **more}
