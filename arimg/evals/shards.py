"""Features of many samples on disk, in shards: each is written in one step, so a kill loses the one in the making."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arimg.errors import InputError
from arimg.evals.compare import differences
from arimg.evals.extractors import Features
from arimg.images import replacing

IDENTITY = "samples.json"


class Shards:
    """A folder of `features-00000.npz` ... and, where wanted, `pictures-00000.npy` ..., and what they were made by."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], number: int, size: int) -> None:
        """`number` samples, `size` to a shard; `identity` is JSON-able. Raises InputError when the folder holds samples
        that were made differently, and names what differs."""
        self.folder = folder
        self._number, self._size = number, size
        folder.mkdir(parents=True, exist_ok=True)
        note, text = folder / IDENTITY, json.dumps(identity, indent=2, sort_keys=True)
        if note.is_file():
            differing = differences(_read_note(note), json.loads(text))
            if differing:
                raise InputError(f"--work {folder}: holds samples that were made differently ({'; '.join(differing)}); "
                                 "give another folder, or leave --work out")
        else:
            with replacing(note) as stream:
                stream.write(text.encode())

    def __len__(self) -> int:
        return -(-self._number // self._size)

    def rows(self, index: int) -> range:
        """Which samples a shard holds."""
        return range(index * self._size, min((index + 1) * self._size, self._number))

    def complete(self, index: int, pictures: bool) -> bool:
        """Whether the shard is on disk and not cut off, with its pictures if these are wanted."""
        whole = zipfile.is_zipfile(self._file("features", index))
        return whole and (not pictures or self._file("pictures", index).is_file())

    def write(self, index: int, features: Features, digests_N32: np.ndarray, forward_passes: int,
              pixels_NHW3: np.ndarray | None) -> None:
        """`digests_N32`: SHA-256 of the pixels of each sample; `forward_passes`: of the model, summed over batches."""
        if pixels_NHW3 is not None:
            with replacing(self._file("pictures", index)) as stream:
                np.save(stream, pixels_NHW3)
        columns = {name: column for name, column in features._asdict().items() if column is not None}
        with replacing(self._file("features", index)) as stream:
            np.savez(stream, digests=digests_N32, forward_passes=forward_passes, **columns)

    @contextmanager
    def features(self) -> Iterator[Features]:
        """All features as memory maps, which vanish afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            yield Features(*(self._merged(name, Path(scratch)) for name in Features._fields))

    def digest(self) -> str:
        """One SHA-256 for the pixels of all samples."""
        whole = hashlib.sha256()
        for index in range(len(self)):
            whole.update(self._column(index, "digests").tobytes())
        return whole.hexdigest()

    def forward_passes(self) -> int:
        """Of the model, over all batches."""
        return sum(int(self._column(index, "forward_passes")) for index in range(len(self)))

    def pictures(self) -> Iterator[np.ndarray]:
        """The pixels, shard by shard."""
        for index in range(len(self)):
            yield np.load(self._file("pictures", index), mmap_mode="r")

    def drop(self, pattern: str) -> None:
        """Remove files of the folder: `pictures-*` after they went elsewhere, drafts that a kill has left."""
        for path in self.folder.glob(pattern):
            path.unlink()

    def _file(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:05}{'.npz' if kind == 'features' else '.npy'}"

    def _column(self, index: int, name: str) -> Any:
        """Raises InputError on a damaged file."""
        path = self._file("features", index)
        try:
            with np.load(path, allow_pickle=False) as file:
                return file[name] if name in file else None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: is damaged ({error}); delete it, and the same command makes it again") from None

    def _merged(self, name: str, scratch: Path) -> Any:
        first = self._column(0, name)
        if first is None:
            return None
        merged = np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", first.dtype, (self._number, *first.shape[1:]))
        for index in range(len(self)):
            rows = self.rows(index)
            merged[rows.start:rows.stop] = self._column(index, name)
        return merged


def _read_note(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"--work {path.parent}: {path.name} is damaged ({error}); delete the folder, or give "
                         "another") from None
