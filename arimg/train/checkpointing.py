"""Checkpoints on disk: whole or not there.

A checkpoint is a folder of files and a manifest of their sizes and checksums, written under another name, forced to the
disk and renamed at the end: wherever a kill or a full disk strikes, the checkpoints before it stay as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from arimg.errors import CheckpointError

MANIFEST = "manifest.json"
_WRITING = ".writing"
_PREFIX = "checkpoint-"
_log = logging.getLogger("arimg")


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, damaged ones included."""
    found = [path for path in run.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


class _Summed:
    """A file that sums up what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append `data`."""
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand everything to the system."""
        self.file.flush()


def _write(path: Path, save: Callable[[Any], object]) -> dict[str, Any]:
    """A file that is on the disk in the end. Returns its entry in the manifest."""
    with _open(path) as file:
        summed = _Summed(file)
        save(summed)
        file.flush()
        _sync(file.fileno())
    return {"bytes": summed.bytes, "sha256": summed.digest.hexdigest()}


def _open(path: Path) -> BinaryIO:
    return open(path, "wb")


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(run: Path, step: int, parts: Mapping[str, Any], texts: Mapping[str, str], keep: int) -> Path:
    """Write `parts` (name.pt: tensors and plain values, nested) and `texts` (whole file names) as the checkpoint of
    `step`, then delete all but the newest `keep`. Raises CheckpointError when the disk refuses; the checkpoints before
    are then untouched."""
    final, temporary = run / f"{_PREFIX}{step}", run / _WRITING
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        manifest = {f"{name}.pt": _write(temporary / f"{name}.pt", partial(torch.save, part))
                    for name, part in parts.items()}
        manifest |= {name: _write_text(temporary / name, text) for name, text in texts.items()}
        _write_text(temporary / MANIFEST, json.dumps(manifest, indent=1))
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(run)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:        # torch.save wraps an OSError of its file
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_failure(run, final, error)) from error
    return final


def _write_text(path: Path, text: str) -> dict[str, Any]:
    return _write(path, lambda file: file.write(text.encode()))


def _failure(run: Path, final: Path, error: BaseException) -> str:
    """One line: what could not be written, and what to go on from."""
    cause = error
    while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__        # type: ignore[assignment]
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
    whole = list_checkpoints(run)
    kept = f"{whole[-1].name} is whole" if whole else "there is no earlier one"
    return (f"{final}: could not be written ({reason}); {kept}; make room or mend the disk, then give the same command "
            "again")


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The parts by name, on the CPU, every byte checked. Raises CheckpointError when it is damaged, or was written
    before there were manifests."""
    manifest = _read_manifest(checkpoint)
    for name, entry in manifest.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint}: is damaged ({name} is missing or was changed); resume another one")
    return {name.removesuffix(".pt"): torch.load(checkpoint / name, map_location="cpu", weights_only=True)
            for name in manifest if name.endswith(".pt")}


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint}: is damaged or incomplete ({MANIFEST} cannot be read); resume another "
                              "one") from error
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_format(checkpoint: Path) -> None:
    """Raises CheckpointError on a folder that accelerate's save_state wrote, as the loop once did."""
    if (checkpoint / "optimizer.bin").is_file() and not (checkpoint / MANIFEST).exists():
        raise CheckpointError(f"{checkpoint}: was written by an earlier version of arimg, whose runs cannot be "
                              f"resumed; start a new one from its weights: name=NEW init_from="
                              f"{checkpoint.parent / 'export'}")


def find_latest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its parts; None if the run has no checkpoints at all. Damaged ones are
    skipped with a warning. Raises CheckpointError when all are damaged."""
    found = list_checkpoints(run)
    for checkpoint in reversed(found):
        check_format(checkpoint)
        try:
            return checkpoint, read_checkpoint(checkpoint)
        except CheckpointError as error:
            _log.warning("%s; trying the one before", error)
    if found:
        raise CheckpointError(f"{run}: none of its checkpoints is whole ({', '.join(path.name for path in found)}); "
                              "delete them to start again, or choose another name=...")
    return None
