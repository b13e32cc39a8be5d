"""Frozen dataclasses <-> strict YAML, JSON and dotted overrides. Imports no torch.

Omegaconf reads and merges; `from_dict` checks every key and type, so that a typing error never trains a night in vain.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from arimg.errors import ConfigError

T = TypeVar("T")

_DEEP = re.compile("layers|blocks|depth")       # names of numbers of blocks
_MOST_BLOCKS, _MOST = 1000, 2 ** 20

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build the dataclass `cls` from plain data, nested dataclasses and tuples included; absent keys keep defaults.

    Raises ConfigError with the dotted key on an unknown key (and names the nearest known one), on a missing or
    ill-typed value and on `???`, which a file writes where its reader has to fill in a value.
    """
    result: T = _build(cls, data, "")
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """The plain, JSON-able form of a dataclass, the inverse of `from_dict`: lists for tuples, text for paths."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Defaults of `cls`, then the YAML file, then overrides such as `optim.lr=1e-3`; later ones win.

    Raises ConfigError when the file cannot be read or parsed, an override has no `=`, or as `from_dict`.
    """
    values = read_values(path, overrides)
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{_where(path, overrides)}: {error}") from error


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain content of a YAML file with overrides merged in.

    Raises ConfigError when either cannot be read, and on a `${...}` interpolation, which could read the environment of
    whoever loads a stranger's file.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        parts = [OmegaConf.create() if path is None else _read_yaml(Path(path)), _parse_overrides(overrides)]
        for part in parts:                      # before the merge, which resolves some of them
            _refuse_interpolations(OmegaConf.to_container(part, resolve=False), _where(path, overrides))
        return OmegaConf.to_container(OmegaConf.merge(*parts), resolve=False)   # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ConfigError(f"{_where(path, overrides)}: {_one_line(error)}") from error


def check_sizes(config: Any, *may_be_zero: str) -> None:
    """Raises ConfigError for a whole number in a network's config that is not positive, or so large that building the
    network would never end."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not str(field.type).startswith("int") or value is None:
            continue
        least, most = int(field.name not in may_be_zero), _MOST_BLOCKS if _DEEP.search(field.name) else _MOST
        if not least <= value <= most:
            raise ConfigError(f"{field.name}={value}: must be from {least} to {most}")


def dump_config(config: Any) -> str:
    """YAML text that `load_config` turns into an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _where(path: str | Path | None, overrides: Sequence[str]) -> str:
    """What an error message starts with."""
    return " + ".join([str(path)] * (path is not None) + ["overrides"] * bool(overrides)) or "defaults"


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({_one_line(error)}); give the path of a YAML file") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: is not plain YAML ({_one_line(error)})") from error
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"{path}: holds a list or a bare value; a configuration is lines of the form 'key: value'")
    return content


def _parse_overrides(overrides: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    for override in overrides:
        if not override.partition("=")[0].strip() or "=" not in override:
            raise ConfigError(f"override {override!r}: write it as key=value, for example optim.lr=1e-3")
    return OmegaConf.from_dotlist(list(overrides))


def _refuse_interpolations(value: Any, where: str, key: str = "") -> None:
    """`key` is the dotted one of the value."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            _refuse_interpolations(entry, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _refuse_interpolations(entry, where, f"{key}[{index}]")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: {key} = {value!r}: interpolations are refused; write the value itself")


def _build(cls: type, data: Any, key: str) -> Any:
    """One dataclass; `key` is its own dotted key, empty at the root."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{key or 'the configuration'} = {data!r}: needs keys of its own, those of {cls.__name__}")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in data:
        if name not in fields:
            close = get_close_matches(str(name), fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {prefix}{name}; {hint}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in data and not has_default:
            raise ConfigError(f"{prefix}{name}: has no value and no default; set {prefix}{name}=...")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in data.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotation `hint` wants it."""
    if value == "???":
        raise ConfigError(f"{key}: is left for you to fill in; write {key}=VALUE")
    origin = get_origin(hint)
    if hint is Any or (hint is type(None) and value is None):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, key)
    if origin is Literal:
        return _convert_literal(get_args(hint), value, key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)                                         # type: ignore[arg-type]
    if (origin or hint) is dict:
        return _convert_dict(hint, value, key)
    if (origin or hint) in (tuple, list):
        return _convert_items(hint, value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    quoting = "; YAML takes yes, no, on and off for true and false: put the text in quotes, \"'no'\""
    raise ConfigError(f"{key} = {value!r}: needs {_KINDS.get(hint, hint)}"
                      f"{quoting if hint is str and isinstance(value, bool) else ''}")


def _convert_union(hint: Any, value: Any, key: str) -> Any:
    failures = []
    for choice in get_args(hint):
        try:
            return _convert(choice, value, key)
        except ConfigError as error:
            if choice is not type(None):
                failures.append(error)
    raise failures[0]


def _convert_literal(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if value not in choices:
        raise ConfigError(f"{key} = {value!r}: choose one of {', '.join(map(str, choices))}")
    return value


def _convert_dict(hint: Any, value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} = {value!r}: needs keys with values")
    item = (get_args(hint) or (str, Any))[1]
    return {str(name): _convert(item, entry, f"{key}.{name}") for name, entry in value.items()}


def _convert_items(hint: Any, value: Any, key: str) -> Any:
    """Lists and tuples, of any length (`tuple[int, ...]`, `list[int]`) or a fixed one (`tuple[int, int]`)."""
    kind, items = get_origin(hint) or hint, get_args(hint) or (Any, ...)
    if not isinstance(value, (list, tuple)):
        example = "[a, b]" if items[0] is str else "[1, 2]"
        raise ConfigError(f"{key} = {value!r}: needs a list, for example {example}")
    if kind is list or items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ConfigError(f"{key} = {list(value)!r}: needs exactly {len(items)} values")
    return kind(_convert(item, entry, f"{key}[{i}]") for i, (item, entry) in enumerate(zip(items, value)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
