"""Options and helpers that the evaluations share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arimg.errors import InputError
from arimg.home import arimg_home

if TYPE_CHECKING:
    from arimg.data import EmojiSet
    from arimg.evals.extractors import Extractor
    from arimg.evals.report import Report


def options(*chosen: Callable) -> Callable:
    """A decorator that adds several options, in the order given."""
    def add(function: Callable) -> Callable:
        for option in reversed(chosen):
            function = option(function)
        return function
    return add


report_options = options(
    click.option("--json", "json_path", metavar="FILE", help="Write figures and protocol there."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Chooses the pictures; sample k has seed + k."))

data_option = click.option("--data", "data_folder", metavar="DIR",
                           help="The emoji data set [default: $ARIMG_HOME/data/emoji-128, or of the model's size].")


def extractor_options(default: str) -> Callable:
    """The network whose features are compared."""
    return options(
        click.option("--extractor", "extractor_name", default=default, show_default=True, metavar="NAME",
                     help="Feature network: inception (FID) or effnet_lite0 (needs no download, and is no FID)."),
        click.option("--inception", metavar="FILE|download", help="Inception's weights [default: $ARIMG_INCEPTION, or "
                     "what was downloaded before]."))


place_options = options(
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda"),
    click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|..."))

sampling_options = options(
    click.option("--decoder", metavar="NAME", help="How tokens are decoded [default: the model's]."),
    click.option("--cfg", type=float, metavar="X", help="Guidance scale [default: the model's]."),
    click.option("--temperature", type=float, help="[default: the model's]."),
    click.option("--top-k", type=int, help="[default: the model's]."),
    click.option("--top-p", type=float, help="[default: the model's]."))


def from_yaml(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Callback of the eager option --config: the file's values become the defaults of all other options.

    Raises ConfigError on a file that cannot be read, an unknown key (with the nearest known one), or an interpolation.
    """
    if path is None:
        return
    from arimg.config import read_values
    from arimg.errors import ConfigError, UnknownNameError

    values = read_values(path)
    known = {option[2:].replace("-", "_"): one.name for one in ctx.command.params for option in one.opts
             if option.startswith("--") and one.name != param.name}
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: {UnknownNameError('key', str(key), known)}")
    ctx.default_map = {str(known[key]): value for key, value in values.items()}


config_option = click.option("--config", is_eager=True, expose_value=False, callback=from_yaml, metavar="FILE.yaml",
                             help="Take options from a file, as in configs/eval; those given beside it win.")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def check_file(path: str | None, suffix: str = "") -> None:
    """Raises InputError when a file cannot be written there, before the long work."""
    if path is None:
        return
    from arimg.images import check_target

    if not path.endswith(suffix):
        raise InputError(f"{path}: such files end in {suffix}; name it {path}{suffix}")
    check_target(path)


def load_data(folder: str | None, size: int = 128) -> EmojiSet:
    """The data set. Raises InputError."""
    from arimg.data import load_emoji

    return load_emoji(Path(folder) if folder else arimg_home() / "data" / f"emoji-{size}")


def load_extractor(name: str, inception: str | None, device: Any = "cpu") -> Extractor:
    """Raises UnknownNameError, MissingExtraError, CheckpointError, InputError."""
    from arimg.evals.extractors import find_extractor

    return find_extractor(name, device, inception)


def show(report: Report, json_path: str | None) -> None:
    """The table on stdout, the whole in the file."""
    from arimg.commands.recipe import write_json

    if json_path is not None:
        write_json(json_path, report.as_json())
    click.echo(report.as_markdown())
