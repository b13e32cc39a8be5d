"""From a YAML file to a running loop: `arimg train configs/train/X.yaml [key=value ...]`, or under torchrun or
`accelerate launch -m arimg.train ...` with the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arimg.config import from_dict, read_values
from arimg.errors import ConfigError
from arimg.registry import OBJECTIVES


def load_run(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The objective's config from a YAML file and overrides. Raises ConfigError, UnknownNameError."""
    values = read_values(path, overrides)
    name = values.get("objective")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: has no objective; write objective: {' or '.join(OBJECTIVES.names())}")
    return from_dict(OBJECTIVES.load(name).config_class, values)


def main(path: Path, overrides: Sequence[str] = (), resume: str = "latest") -> Path:
    """Train; returns the folder of exported weights. Raises ConfigError and what the objective raises."""
    config = load_run(path, overrides)
    from accelerate import PartialState

    from arimg.train.loop import on_cpu, train

    with PartialState(cpu=on_cpu()).main_process_first():       # one process makes the caches, the others find them
        objective = OBJECTIVES.load(config.objective)(config)
    return train(config, objective, resume)
