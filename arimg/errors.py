"""What a user can get wrong: every message says the value seen, why it is wrong, and what to type instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SHOWN = 40         # names that a message lists


class ArimgError(ValueError):
    """Base of every error that a user can cause. The command line prints it as one line and exits with 2."""


class InputError(ArimgError):
    """An image, a size or an option value that cannot be used."""


class ConfigError(ArimgError):
    """A configuration file or override that cannot be used."""


class CheckpointError(ArimgError):
    """A checkpoint folder or file that is missing, damaged, unsafe or does not fit its config."""


class UnknownNameError(ArimgError):
    """A name that no registry knows; suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=3, cutoff=0.5)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        listed = f"known: {', '.join(names[:_SHOWN]) or 'none'}{more}"
        hint = f"did you mean {' or '.join(close)}?" if close else listed
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class MissingExtraError(ArimgError):
    """An optional dependency that is not installed."""

    def __init__(self, extra: str, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed; type: pip install 'arimg[{extra}]'")
