"""TensorBoard and Weights & Biases, through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from arimg.config import to_dict
from arimg.errors import MissingExtraError


def check_trackers(names: Sequence[str]) -> list[str]:
    """The names. Raises MissingExtraError for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError("trackers", name, f"train.trackers: {name}")
    return list(names)


def flat(config: Any) -> dict[str, Any]:
    """A config as trackers take it: dotted keys, plain values."""
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(to_dict(config)).items()}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys; empty tables stay."""
    items: dict[str, Any] = {}
    for key, value in values.items():
        items |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return items
