"""`arimg data`: data sets on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from arimg.errors import InputError
from arimg.home import arimg_home


@click.group("data", no_args_is_help=False, epilog="\b\nExample: arimg data emoji --size 128")
def command() -> None:
    """Build data sets."""


@command.command("emoji", epilog="\b\nExample: arimg data emoji --source npm-packages/ --size 128")
@click.option("--size", type=int, default=128, show_default=True, metavar="PIXELS")
@click.option("--source", metavar="DIR", help="The four npm packages, packed or unpacked [default: fetched with npm].")
@click.option("--out", metavar="DIR", help="[default: $ARIMG_HOME/data/emoji-SIZE].")
def emoji(size: int, source: str | None, out: str | None) -> None:
    """Render the emoji data set: about 14,400 pictures in 36 classes. Prints its folder."""
    from arimg.train.emoji import build_emoji

    folder = Path(out) if out else arimg_home() / "data" / f"emoji-{size}"
    if source is not None and not Path(source).is_dir():
        raise InputError(f"--source {source}: no such folder; give the one that holds the packages, or leave it out")
    click.echo(build_emoji(folder, Path(source) if source else None, size))
