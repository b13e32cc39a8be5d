"""`arimg eval`: how good a tokenizer, a model, its obedience to control images, or a set of pictures is."""

from __future__ import annotations

import click

from arimg.commands.eval_models import all_rows, control, imagenet, tokenizer
from arimg.commands.eval_nll import nll
from arimg.commands.eval_sets import compare, fid, reference


@click.group("eval", no_args_is_help=False,
             epilog="\b\nExample: arimg eval control --model emoji -n 200 --json control.json")
def command() -> None:
    """Measure tokenizers, obedience to controls, and sets of pictures.

    Prints a Markdown table; --json writes the figures with the whole protocol. What each metric means:
    docs/evaluation.md.
    """


for one in (tokenizer, control, imagenet, all_rows, nll, fid, reference, compare):
    command.add_command(one)
