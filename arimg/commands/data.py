"""`arimg data`: data sets on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arimg.errors import InputError
from arimg.home import arimg_home

if TYPE_CHECKING:
    from arimg.train.codes import CodeCache

_PICTURES_AT_ONCE = 32


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


@command.command("codes", epilog="\b\nExample: arimg data codes --tokenizer "
                                 "~/.cache/arimg/runs/emoji-tokenizer/export/tokenizer")
@click.option("--tokenizer", required=True, metavar="FOLDER", help="A tokenizer's component folder.")
@click.option("--data", metavar="FOLDER", help="Made by arimg data emoji [default: $ARIMG_HOME/data/emoji-128].")
def codes(tokenizer: str, data: str | None) -> None:
    """Encode every picture of a data set and its mirror image, ahead of training. Prints the file of codes.

    Training does the same picture by picture, and so does this: what has been encoded before is not encoded again, and
    after Ctrl-C the same line goes on.
    """
    import torch

    from arimg.checkpoints import load_component
    from arimg.data import load_emoji
    from arimg.devices import find_device
    from arimg.train.codes import CodeCache

    folder = Path(data) if data else arimg_home() / "data" / "emoji-128"
    emoji = load_emoji(folder)
    network = load_component(tokenizer, torch.float32, find_device("auto"))
    if not hasattr(network, "encode"):
        raise InputError(f"--tokenizer {tokenizer}: holds the component {type(network).__name__}, which encodes no "
                         "pictures; give a tokenizer's folder")
    cache = CodeCache(folder / "codes", emoji.images, network, emoji.fingerprint)
    _fill(cache)
    click.echo(cache.codes.filename)


def _fill(cache: CodeCache) -> None:
    """Ask for all codes once, a few at a time."""
    import numpy as np
    from tqdm import tqdm

    rows = np.arange(len(cache.codes))
    with tqdm(total=len(rows), desc="codes", unit="picture", file=sys.stderr) as bar:
        for start in range(0, len(rows), _PICTURES_AT_ONCE):
            chunk = rows[start:start + _PICTURES_AT_ONCE]
            cache.get(chunk)
            bar.update(len(chunk))
