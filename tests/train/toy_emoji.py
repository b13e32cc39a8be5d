"""A toy emoji folder, as `arimg data emoji` would write it: coloured squares on white."""

import json
from pathlib import Path

import numpy as np

from arimg.train.emoji import FORMAT


def write_toy_emoji(folder: Path, count: int = 12, size: int = 16) -> Path:
    """Pictures of `count` squares in two classes; every fourth is held out."""
    rng = np.random.default_rng(0)
    images = np.full((count, size, size, 3), 255, dtype=np.uint8)
    for image in images:
        top, left = rng.integers(1, size // 2, 2)
        image[top:top + size // 3, left:left + size // 3] = rng.integers(0, 200, 3)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", images)
    items = [{"class_id": i % 2, "split": "held_out" if i % 4 == 3 else "train", "name": f"square-{i}"}
             for i in range(count)]
    index = {"format": FORMAT, "size": size, "class_names": ["toy/even", "toy/odd"], "items": items}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
