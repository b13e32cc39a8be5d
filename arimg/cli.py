"""The command line: `arimg COMMAND ...`. Each command lives in arimg/commands and is imported when it is called.

Results go to stdout; progress, notices and errors to stderr. Exit codes: 0 success, 2 an error that the user can mend
(one line says how), 130 interrupted.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from arimg import __version__
from arimg.errors import ArimgError, UnknownNameError
from arimg.memory import keep_freed_memory

COMMANDS = {
    "sample": "Paint pictures along control images.",
    "control": "Make a control image from a photo.",
    "train": "Train a network from a YAML file.",
    "eval": "Measure tokenizers, obedience to controls, and sets of pictures.",
    "bench": "Measure speed: training steps and decoders.",
    "convert": "Original checkpoint files into a pipeline folder.",
    "export": "A model for ONNX Runtime or OpenVINO.",
    "data": "Build data sets.",
    "models": "What is installed, with sources and licences.",
}


class NoticeHandler(logging.Handler):
    """Notices of the package as one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        click.echo(f"arimg: {record.getMessage()}", err=True)


class Cli(click.Group):
    """Imports a command only when it is called, and turns every error of a user into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"arimg.commands.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that `args` begin with. Raises UnknownNameError with the nearest names."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UnknownNameError("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of the help page, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
             standalone_mode: bool = True, **extra: Any) -> Any:
        """Run and exit. With standalone_mode=False return, and let errors through, as in click."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:                                 # Ctrl-C
            fail("interrupted; nothing half-written is left", 130)
        except click.ClickException as error:
            where = getattr(error, "ctx", None)
            fail(f"{error.format_message().rstrip('.')}; see: {where.command_path if where else 'arimg'} --help", 2)
        except ArimgError as error:
            fail(str(error), 2)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}; check the path, its permissions and the free space", 2)
        except (MemoryError, RuntimeError) as error:
            fail(_out_of_memory(error), 2)
        sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: MemoryError | RuntimeError) -> str:
    """What to say when memory has run out: torch, which is not imported here, raises its RuntimeErrors for that as
    well. Raises any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|not enough memory", text):
        raise error
    tried = re.search(r"tried to (allocate [\d.]+ \w+)", text, re.IGNORECASE)
    return f"out of memory{f' (tried to {tried[1]})' if tried else ''}; use a smaller -n, --size, batch or model"


def fail(message: str, code: int) -> None:
    """One line on stderr, and out."""
    click.echo(f"arimg: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group("arimg", cls=Cli, no_args_is_help=False,
             context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
             epilog="\b\nExample: arimg sample --control examples/canny.png --class fluent/animals -o cat.png")
@click.version_option(__version__, prog_name="arimg")
def main() -> None:
    """A control image goes in, an autoregressive model paints along its lines."""
    keep_freed_memory()
    gc.set_threshold(50_000)        # imports make objects that stay: looking for garbage in them takes 0.3 s
    log = logging.getLogger("arimg")
    if not any(isinstance(handler, NoticeHandler) for handler in log.handlers):
        log.addHandler(NoticeHandler())
        log.setLevel(logging.INFO)
