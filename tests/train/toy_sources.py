"""Pictures as a folder of classes and as tar shards: blocks of colour, of many sizes, with classes and captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from arimg.train.shards import write_index

CLASSES = ("cat", "dog", "emu")


def picture(number: int) -> Image.Image:
    """A picture of its own size and colours; the red of its upper left corner is the number."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(20, 40, 2)
    pixels = np.repeat(np.repeat(rng.integers(0, 200, (5, 5, 3)), 8, axis=0), 8, axis=1)[:height, :width]
    pixels[:4, :4, 0] = number
    return Image.fromarray(pixels.astype(np.uint8))


def png(number: int) -> bytes:
    """The file of a picture."""
    stream = io.BytesIO()
    picture(number).save(stream, "png")
    return stream.getvalue()


def write_folder(folder: Path, count: int = 12) -> Path:
    """FOLDER/CLASS/N.png and a caption beside each."""
    for number in range(count):
        place = folder / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03d}.png").write_bytes(png(number))
        (place / f"{number:03d}.txt").write_text(f"a {CLASSES[number % 3]}. On grass.\n", encoding="utf-8")
    return folder


def write_shard(path: Path, numbers: range) -> Path:
    """One tar file: png, cls and txt of each key; every fourth sample has a .json instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            text = f"a {CLASSES[number % 3]}. On grass."
            members = {"png": png(number), "cls": str(number % 3).encode(), "txt": text.encode()}
            if number % 4 == 3:
                members = {"json": json.dumps({"label": number % 3, "caption": text}).encode(), "png": png(number)}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int = 4, each: int = 6) -> Path:
    """Shards of `each` samples, the last one shorter by one, indexed."""
    for shard in range(shards):
        write_shard(folder / f"train-{shard:02d}.tar", range(shard * each, (shard + 1) * each - (shard == shards - 1)))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    write_index(folder, threads=2)
    return folder


def number_of(image: Image.Image) -> int:
    """The number of a whole toy picture."""
    red: int = np.asarray(image)[0, 0, 0]
    return int(red)
