"""Two reports side by side: allowed only if both were made by one protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from arimg.errors import InputError

# What is measured, and with which programs: these may differ, and are named when they do. All else is the protocol.
SUBJECT = ("model", "weights_sha256", "options", "versions", "work", "pictures.source", "pictures.fingerprint",
           "pictures_sha256", "reference.source", "exported")
_MISSING = "(not there)"
_SHOWN = 8
_LONGEST = 40
_HEAD = 2               # lines of a table before its first row


def read_report(path: Path) -> dict[str, Any]:
    """A JSON report of `arimg eval`. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a report written with --json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not _is_report(content):
        raise InputError(f"{path}: is no report of arimg eval; give a file written with --json")
    return content


def _is_report(content: Any) -> bool:
    """Whether it has a protocol, and results[set][metric]["value"]."""
    if not isinstance(content, dict) or not isinstance(content.get("protocol"), dict):
        return False
    sets = content.get("results")
    return isinstance(sets, dict) and all(
        isinstance(figures, dict) and all(isinstance(found, dict) and "value" in found for found in figures.values())
        for figures in sets.values())


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """A Markdown table of all figures that both have, with differences, then what differs in the subject.

    The interval of a difference is that of independent figures (Zou and Donner 2008, square-and-add), so it is too wide
    where both measured the same pictures. Raises InputError that names the keys of unlike protocols, and on reports
    without a common figure.
    """
    differing = differences(first["protocol"], second["protocol"], lambda key: not _is_subject(key))
    if differing:
        raise InputError(f"the protocols differ, so the figures do not compare: {'; '.join(differing)}; measure both "
                         "alike")
    lines = ["| set | metric | first | second | difference |", "| --- | --- | --- | --- | --- |"]
    for name, figures in first["results"].items():
        for metric, one in figures.items():
            other = second["results"].get(name, {}).get(metric)
            if other is not None and one["value"] is not None and other["value"] is not None:
                lines.append(f"| {name} | {metric} | {one['value']:.4g} | {other['value']:.4g} | "
                             f"{_difference(one, other)} |")
    if len(lines) == _HEAD:
        raise InputError("the reports have no figure in common: one has "
                         f"{', '.join(first['results']) or 'no sets'}, the other "
                         f"{', '.join(second['results']) or 'no sets'}; give reports of one evaluation")
    subject = differences(first["protocol"], second["protocol"], _is_subject)
    return "\n".join([*lines, "", *(f"- {line}" for line in subject)]).rstrip()


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    change = other["value"] - one["value"]
    (low, high), (other_low, other_high) = (figure.get("interval", (None, None)) for figure in (one, other))
    if None in (low, high, other_low, other_high):
        return f"{change:+.4g}"
    below = sqrt((other["value"] - other_low) ** 2 + (high - one["value"]) ** 2)
    above = sqrt((other_high - other["value"]) ** 2 + (one["value"] - low) ** 2)
    return f"{change:+.4g} [{change - below:+.4g}, {change + above:+.4g}]"


def differences(first: Mapping[str, Any], second: Mapping[str, Any],
                counts: Callable[[str], bool] = lambda key: True) -> list[str]:
    """"key: value / other value" for every key that differs and `counts`; the first few, and how many more."""
    ours, theirs = _flat(first), _flat(second)
    keys = [key for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key, _MISSING) != theirs.get(key, _MISSING) and counts(key)]
    shown = [f"{key}: {_short(ours.get(key, _MISSING))} / {_short(theirs.get(key, _MISSING))}" for key in keys[:_SHOWN]]
    return shown + [f"and {len(keys) - _SHOWN} more"] * (len(keys) > _SHOWN)


def _is_subject(key: str) -> bool:
    return any(key == subject or key.startswith(f"{subject}.") for subject in SUBJECT)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
