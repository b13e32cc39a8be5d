"""Option values that click does not know: sizes and intervals."""

from __future__ import annotations

import re
from typing import Any

import click


class Size(click.ParamType):
    """"96x160" -> (96, 160): height and width."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(height, width); tuples pass."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", str(value))
        if match is None:
            self.fail(f"{value!r} is no size; write height x width in pixels, for example 128x128", param, ctx)
        return int(match[1]), int(match[2])


class Interval(click.ParamType):
    """"16:128" -> (16, 128), "16:" -> (16, None)."""

    name = "interval"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int | None]:
        """(first, stop); tuples pass."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{0,9}):(\d{0,9})", str(value))
        if match is None:
            self.fail(f"{value!r} is no interval; write token positions as first:stop, for example 0:128", param, ctx)
        return int(match[1] or 0), int(match[2]) if match[2] else None


SIZE = Size()
INTERVAL = Interval()
