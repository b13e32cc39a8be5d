"""The file layout of ADM's evaluator: `arr_0`, uint8 (N, H, W, 3), in an .npz, read and written as a stream.

50,000 pictures of 256x256 are 9.8 GB: numpy maps no .npz into memory, and saving one needs all of it there.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from arimg.errors import InputError
from arimg.images import replacing

PICTURES = "arr_0"
_DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile)


class Npz(NamedTuple):
    """What an .npz holds: the names of its arrays, and the shape of its pictures, if it has any."""

    path: Path
    names: frozenset[str]
    shape: tuple[int, ...] | None

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Its pictures in order, `size` at a time. Raises InputError on a damaged file."""
        assert self.shape is not None
        with _member(self.path) as stream:
            _read_shape(self.path, stream)
            for first in range(0, self.shape[0], size):
                count = min(size, self.shape[0] - first)
                wanted = count * int(np.prod(self.shape[1:]))
                content = stream.read(wanted)
                if len(content) < wanted:
                    raise EOFError("it ends before its last picture")
                yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])


def open_npz(path: Path) -> Npz:
    """Raises InputError: missing, damaged, or with an `arr_0` that is not 8-bit RGB pictures."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a folder of pictures or an .npz file") from None
    except _DAMAGE as error:
        raise InputError(f"{path}: not an .npz file, or damaged ({error}); fetch or write it again") from None
    if PICTURES not in names:
        return Npz(path, names, None)
    with _member(path) as stream:
        return Npz(path, names, _read_shape(path, stream))


@contextmanager
def _member(path: Path) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as stream:
            yield stream
    except _DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({error}); fetch or write it again") from None


def _read_shape(path: Path, stream: IO[bytes]) -> tuple[int, ...]:
    """The shape in the array's header; the stream stands at its first picture then."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_columns:
        raise InputError(f"{path}: {PICTURES} is {dtype} of shape {shape}; pictures are uint8 (N, height, width, 3)")
    return shape


def write_npz(path: Path, shape: tuple[int, int, int, int], batches: Iterable[np.ndarray]) -> None:
    """Write pictures that come in batches and are `shape` together: the whole file or nothing. Raises InputError."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        with archive.open(f"{PICTURES}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for pixels_BHW3 in batches:
                member.write(np.ascontiguousarray(pixels_BHW3).data)
