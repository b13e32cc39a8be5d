"""Folders of what is computed once per sample: codes, maps, caption features. One file per group (shard) of a source,
written whole or not at all, and a `meta.json` that says what the files depend on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from arimg.errors import ConfigError, InputError
from arimg.images import replacing
from arimg.train.sources import Group, Source

META = "meta.json"


class CacheFolder:
    """The files of one kind for one source. Rows are looked up by the source's sample numbers."""

    def __init__(self, folder: Path, source: Source, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.groups = source.groups
        self.meta = json.loads(json.dumps({**meta, "source": source.fingerprint}))
        self.starts = np.concatenate([[0], np.cumsum([group.size for group in source.groups])])
        self.load = lru_cache(maxsize=1024)(self._load)

    def path(self, group: Group) -> Path:
        """Where the file of a group lies."""
        return self.folder / (group.name.removesuffix(".tar").replace("/", "--") + ".npy")

    def missing(self) -> list[Group]:
        """Groups without a file, those that another process is still writing included."""
        return [group for group in self.groups if not self.path(group).is_file()]

    def claim(self) -> None:
        """Write the meta file, or check that it is the one that is there. Raises ConfigError."""
        if not (self.folder / META).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / META) as stream:
                stream.write((json.dumps(self.meta, indent=1) + "\n").encode())
        self.check()

    def check(self) -> None:
        """Raises ConfigError when the files depend on something else than this run does."""
        try:
            found = json.loads((self.folder / META).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.cache: {self.folder} holds no cache; make it with {self._command()}, or write "
                              "data.cache='' to do without") from error
        for name, wanted in self.meta.items():
            if found.get(name) != wanted:
                raise ConfigError(f"data.cache: {self.folder} was made with {name} {found.get(name)}, this run has "
                                  f"{wanted}; make another one with {self._command()} and another data.cache")

    def check_complete(self) -> None:
        """`check`, and every file is there. Raises ConfigError."""
        self.check()
        missing = self.missing()
        if missing:
            raise ConfigError(f"data.cache: {self.folder} lacks {len(missing)} of {len(self.groups)} files, first "
                              f"{self.path(missing[0]).name}; {self._command()} makes the missing ones")

    def _command(self) -> str:
        return f"arimg data {self.meta['kind']} CONFIG.yaml"

    def place(self, index: int) -> tuple[int, int]:
        """(number of the group, row in it) of a sample."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return group, index - int(self.starts[group])

    def _load(self, number: int) -> Any:
        path = self.path(self.groups[number])
        try:
            return open_records(path) if self.meta["kind"] != "codes" else np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it, and {self._command()} makes it again") \
                from error


class Records:
    """Byte strings of any length in one file: an array of their ends, then the bytes."""

    def __init__(self, ends: np.ndarray, payload: np.ndarray) -> None:
        self.ends = ends
        self.payload = payload

    def __getitem__(self, row: int) -> bytes:
        return self.payload[self.ends[row]:self.ends[row + 1]].tobytes()


def write_records(path: Path, rows: Sequence[bytes]) -> None:
    """Write a file of records, or nothing. Raises InputError."""
    with replacing(path) as stream:
        np.save(stream, np.cumsum([0, *map(len, rows)], dtype=np.int64))
        for row in rows:
            stream.write(row)


def open_records(path: Path) -> Records:
    """The records of a file, memory-mapped. Raises OSError, ValueError."""
    with path.open("rb") as stream:
        ends = np.load(stream)
        start = stream.tell()
    if os.path.getsize(path) != start + ends[-1]:
        raise ValueError("the file is cut off")
    payload = np.memmap(path, np.uint8, "r", start, int(ends[-1])) if ends[-1] else np.zeros(0, np.uint8)
    return Records(ends, payload)
