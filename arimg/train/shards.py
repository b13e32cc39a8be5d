"""Tar shards in the WebDataset layout: consecutive members KEY.jpg, KEY.cls, KEY.txt, KEY.json are one sample.

`arimg data index DIR` reads the headers of all DIR/**/*.tar once and writes, for all of them together,

    arimg-index.json    shards (name, bytes, samples), class names, what was skipped and why
    arimg-index.npy     one record per sample: where its picture and text lie, its class, its key

With it every sample is one positional read away, so the order of training is free, exact resume needs no state, and no
reader has to stream past what it does not want. Class names come from DIR/classes.txt, one a line, if it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arimg.errors import InputError
from arimg.images import load_image, replacing
from arimg.train.sources import NO_CLASS, PICTURES, CorruptSample, Group, log

INDEX_JSON = "arimg-index.json"
INDEX_NPY = "arimg-index.npy"
FORMAT = 1
RECORD = np.dtype([("image_at", "<i8"), ("image_bytes", "<i4"), ("text_at", "<i8"), ("text_bytes", "<i4"),
                   ("is_json", "?"), ("label", "<i4"), ("key", "S96")])

_LABEL_KEYS = ("cls", "class", "label", "class_id")         # of .json members
_CAPTION_KEYS = ("txt", "caption", "text", "prompt")
_OPEN_SHARDS = 64                                           # per process
_BLOCK = 512


class _BadShard(Exception):
    """Why a shard cannot be used."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing the index


def write_index(folder: Path, threads: int = 8,
                progress: Callable[[int], None] = lambda shards: None) -> dict[str, Any]:
    """Index all shards of a folder; returns what the JSON file holds. A shard that is damaged or cut off is skipped
    and named there with the reason. Raises InputError when no shard can be used."""
    paths = sorted(folder.rglob("*.tar"))
    shards, skipped, records = [], {}, []
    with ThreadPoolExecutor(threads) as pool:
        for path, found in zip(paths, pool.map(_read_or_reason, paths)):
            name = path.relative_to(folder).as_posix()
            progress(1)
            if isinstance(found, str):
                log.warning("shard %s skipped: %s", path, found)
                skipped[name] = found
            else:
                shards.append({"name": name, "bytes": path.stat().st_size, "samples": len(found)})
                records.append(found)
    if not shards:
        raise InputError(f"{folder}: holds no usable tar shard (*.tar; {len(skipped)} damaged); compressed ones give "
                         "no random access, so unpack .tar.gz first")
    names = folder / "classes.txt"
    class_names = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    index = {"format": FORMAT, "class_names": class_names, "shards": shards, "skipped": skipped}
    with replacing(folder / INDEX_NPY) as stream:
        np.save(stream, np.concatenate(records))
    with replacing(folder / INDEX_JSON) as stream:          # last: its presence says that both are there
        stream.write((json.dumps(index, indent=1) + "\n").encode())
    return index


def _read_or_reason(path: Path) -> np.ndarray | str:
    try:
        return read_shard(path)
    except (_BadShard, OSError, tarfile.TarError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def read_shard(path: Path) -> np.ndarray:
    """The records of one shard. Raises _BadShard, OSError, TarError."""
    with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        samples = [_record(stream, members) for members in _samples(archive)]
        _check_end(stream, archive.offset, path.stat().st_size)
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        raise _BadShard("holds no pictures")
    return np.array(kept, dtype=RECORD)


def _samples(archive: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """{suffix: member} of each sample, with its key under "". The key ends at the first dot of the file name."""
    sample: dict[str, Any] = {}
    for member in archive:
        if not member.isfile():
            continue
        folder, _, file = member.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if sample and sample[""] != key:
            yield sample
            sample = {}
        sample[""] = key
        sample[f".{suffix.lower()}"] = member
    if sample:
        yield sample


def _record(stream: Any, members: dict[str, Any]) -> tuple[Any, ...] | None:
    """A row of the index; None for a sample without a picture."""
    picture = next((members[suffix] for suffix in PICTURES if suffix in members), None)
    if picture is None:
        return None
    described = members.get(".json")
    text = members.get(".txt") or described
    key = members[""].encode()[-RECORD["key"].itemsize:]
    return (picture.offset_data, picture.size, text.offset_data if text else 0, text.size if text else 0,
            text is not None and text is described, _label(stream, members.get(".cls"), described), key)


def _label(stream: Any, number: tarfile.TarInfo | None, described: tarfile.TarInfo | None) -> int:
    """Class id of a .cls or .json member. Raises _BadShard on one that holds no number."""
    member = number or described
    if member is None:
        return NO_CLASS
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    try:
        if member is number:
            return int(content)
        values = json.loads(content)
        return int(next((values[name] for name in _LABEL_KEYS if name in values), NO_CLASS))
    except (ValueError, TypeError) as error:
        raise _BadShard(f"{member.name} holds no class number") from error


def _check_end(stream: Any, offset: int, size: int) -> None:
    """tarfile stops without a word at a damaged header and at the end of a cut file; a whole archive ends in zeros."""
    stream.seek(offset)
    if offset > size or stream.read(_BLOCK) != bytes(_BLOCK):
        raise _BadShard(f"damaged or cut off at byte {min(offset, size)}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Shard:
    """An open file. Positional reads need no lock; the file closes when the last reader has let go of it."""

    def __init__(self, path: Path, size: int) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        found = os.fstat(self.descriptor).st_size
        if found != size:
            raise OSError(f"has {found} bytes, {size} when it was indexed")
        if hasattr(os, "posix_fadvise"):        # the system fetches the whole shard, in order, ahead of the reads
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises OSError."""
        data = os.pread(self.descriptor, size, offset)
        if len(data) != size:
            raise OSError(f"ends at byte {offset + len(data)}")
        return data


@dataclass(frozen=True)
class _Table:
    """Shards by number."""

    names: list[str]
    sizes: list[int]            # bytes
    starts: np.ndarray          # number of the first sample of each


class ShardSource:
    """The samples of an indexed folder. Raises InputError when it is not indexed, or by another version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            content = (folder / INDEX_JSON).read_bytes()
            index = json.loads(content)
            self.records = np.load(folder / INDEX_NPY, mmap_mode="r")
            counts = [shard["samples"] for shard in index["shards"]]
            fits = index["format"] == FORMAT and self.records.dtype == RECORD and len(self.records) == sum(counts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: has no index of its shards; type: arimg data index {folder}") from error
        if not fits:
            raise InputError(f"{folder}: {INDEX_JSON} and {INDEX_NPY} do not fit; type: arimg data index {folder}")
        self.groups: Sequence[Group] = [Group(shard["name"], shard["samples"]) for shard in index["shards"]]
        self.table = _Table([group.name for group in self.groups], [shard["bytes"] for shard in index["shards"]],
                            np.concatenate([[0], np.cumsum(counts)]))
        self.class_names = tuple(index["class_names"])
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        for name, reason in index["skipped"].items():
            log.warning("shard %s is left out: %s", folder / name, reason)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Image.Image:
        """One read and a decode. Raises CorruptSample."""
        record = self.records[index]
        try:
            return load_image(self._read(index, record["image_at"], record["image_bytes"]))
        except (InputError, OSError) as error:
            raise CorruptSample(f"{self.key(index)}: {error}") from error

    def caption(self, index: int) -> str:
        """Of the .txt or .json member. Raises CorruptSample."""
        record = self.records[index]
        if not record["text_bytes"]:
            return ""
        try:
            text = self._read(index, record["text_at"], record["text_bytes"]).decode()
            values = json.loads(text) if record["is_json"] else {"txt": text}
            return str(next((values[name] for name in _CAPTION_KEYS if name in values), "")).strip()
        except (OSError, ValueError, TypeError) as error:
            raise CorruptSample(f"{self.key(index)}: {error}") from error

    def labels(self) -> np.ndarray:
        """Memory-mapped."""
        return self.records["label"]

    def key(self, index: int) -> str:
        """SHARD: KEY."""
        return f"{self.folder / self.table.names[self._shard_of(index)]}: {self.records[index]['key'].decode()}"

    def _read(self, index: int, offset: Any, size: Any) -> bytes:
        return self._open(self._shard_of(index)).read(int(offset), int(size))

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.table.starts, index, side="right")) - 1

    def _open_shard(self, number: int) -> _Shard:
        return _Shard(self.folder / self.table.names[number], self.table.sizes[number])
