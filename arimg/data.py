"""Sets of pictures on disk, as `arimg data` writes them, and the way from their 8-bit pixels to tensors and back.

An emoji folder holds `images.npy`, (N, S, S, 3) uint8 RGB, and `index.json` with the entries `class_names` and `items`:
one per picture with `class_id`, `split` ("train" or "held_out") and `name`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arimg.errors import InputError


@dataclass(frozen=True)
class EmojiSet:
    """Pictures with labels. Row i of every member is picture i."""

    images: np.ndarray               # (N, S, S, 3) uint8 RGB on white, memory-mapped, read-only
    labels: np.ndarray               # (N,) int64, index into class_names
    held_out: np.ndarray             # (N,) bool
    names: list[str]                 # (N,) icon name in its package
    class_names: tuple[str, ...]     # style/group
    fingerprint: str                 # equal for two sets of the same pictures in the same order


def load_emoji(folder: Path) -> EmojiSet:
    """Open a folder that `arimg data emoji` wrote; the pictures stay on disk. Raises InputError when it is not
    complete."""
    found = open_emoji(Path(folder))
    if found is None:
        raise InputError(f"{folder}: no complete emoji data set; run `arimg data emoji --out {folder}`")
    index, images = found
    items = index["items"]
    return EmojiSet(
        images=images,
        labels=np.array([item["class_id"] for item in items], dtype=np.int64),
        held_out=np.array([item["split"] == "held_out" for item in items], dtype=bool),
        names=[item["name"] for item in items],
        class_names=tuple(index["class_names"]),
        fingerprint=hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:16],
    )


def open_emoji(folder: Path) -> tuple[dict, np.ndarray] | None:
    """The index and the memory-mapped pictures of a data set; None when either is missing or they do not fit."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        images = np.load(folder / "images.npy", mmap_mode="r")
        return (index, images) if len(images) == len(index["items"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def to_images(pixels_BHW3: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels_BHW3)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images_B3HW: Tensor) -> np.ndarray:
    """Float (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3), as `arimg.images.to_pil` does: clipped, truncated, the
    inverse of `to_images`."""
    scaled_B3HW = images_B3HW.detach().float().mul(127.5).add(128).clamp(0, 255).byte()
    return scaled_B3HW.permute(0, 2, 3, 1).cpu().contiguous().numpy()
