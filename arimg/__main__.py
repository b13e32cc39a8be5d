"""`python -m arimg` is the command `arimg`."""

from __future__ import annotations

from arimg.cli import main

main(prog_name="arimg")
