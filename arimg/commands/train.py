"""`arimg train`: a training run from a YAML file."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("train", epilog="\b\nExample: arimg train configs/train/emoji/tokenizer.yaml optim.steps=200")
@click.argument("config", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", default="latest", show_default=True, metavar="latest|none|FOLDER",
              help="Go on from this run's last whole checkpoint, if there is one; from the start; from a checkpoint.")
def command(config: str, overrides: tuple[str, ...], resume: str) -> None:
    """Train what CONFIG.yaml describes; KEY=VALUE changes single values. Prints the folder of the trained weights.

    On several devices: accelerate launch -m arimg.train CONFIG.yaml ..., or torchrun -m with the same.
    """
    from arimg.train.launch import main

    folder = main(Path(config), overrides, resume)
    from accelerate import PartialState  # slow; errors of the YAML file come first

    if PartialState().is_main_process:
        click.echo(folder)
    PartialState().destroy_process_group()
