"""From where a run goes on, and whether it may."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arimg import __version__
from arimg.config import from_dict, read_values, to_dict
from arimg.errors import CheckpointError, ConfigError
from arimg.train.checkpointing import check_format, find_latest, list_checkpoints, read_checkpoint, step_of
from arimg.train.run import RunConfig
from arimg.train.trackers import flatten

_LIBRARIES = ("torch", "accelerate", "diffusers", "timm", "numpy")
_SHOWN = 6      # differing keys that a message names


def library_versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    return {"arimg": __version__, "python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def find_checkpoint(source: str, config: RunConfig, micros: int) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `source` ("latest", "none" or a folder) means, and its parts; None for the start.

    Raises CheckpointError when it cannot be read or when going on would leave later checkpoints of the run behind it,
    ConfigError when it was trained on something else than `config` says.
    """
    run = config.folder()
    if source == "latest":
        found = find_latest(run)
    elif source == "none":
        found = None
    else:
        path = Path(source)
        if not path.is_dir():
            raise ConfigError(f"--resume {source}: no such checkpoint; give latest, none or a checkpoint-N folder of a "
                              "run")
        check_format(path)
        found = path, read_checkpoint(path)
    if found is not None:
        check_same(found[0], config, found[1]["loop"]["micros"], micros)
    _leave_none_behind(run, found[1]["loop"]["step"] if found else -1, damaged=source == "latest")
    return found


def _leave_none_behind(run: Path, step: int, damaged: bool) -> None:
    """Later checkpoints would be taken for the latest once more: damaged ones go, whole ones are the user's."""
    later = [path for path in list_checkpoints(run) if step_of(path) > step]
    if later and not damaged:
        raise CheckpointError(f"{later[-1]}: lies ahead of where this run would go on; delete later checkpoints, or "
                              "choose another name=...")
    for path in later:
        shutil.rmtree(path, ignore_errors=True)


def check_same(checkpoint: Path, config: RunConfig, saved_micros: int, micros: int) -> None:
    """Raises ConfigError naming what differs, unless a run with `config` continues the one of the checkpoint."""
    values = read_values(checkpoint / "config.yaml")
    if values.get("objective") != config.objective:
        raise ConfigError(f"{checkpoint}: was trained with objective={values.get('objective')}, this run has "
                          f"{config.objective}; choose another name=...")
    saved = from_dict(type(config), values)
    before, now = flatten(to_dict(saved)), flatten(to_dict(config))
    free = tuple(f"{key}." for key in config.FREE)
    differing = sorted(key for key in before.keys() | now.keys()
                       if before.get(key) != now.get(key) and not f"{key}.".startswith(free))
    if differing:
        shown = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in differing[:_SHOWN])
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ConfigError(f"{checkpoint}: was trained on something else: {shown}{more}; restore these values, or start "
                          "another run with name=NEW, from these weights with init_from=EXPORT")
    if saved_micros != micros:
        raise ConfigError(f"{checkpoint}: has {saved_micros} micro-batches a step, now processes x train.accumulation "
                          f"are {micros}; change either")


def forget_log(path: Path, step: int) -> None:
    """Drop the lines of steps that a kill after the checkpoint has undone, and one that it cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line + "\n")
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
