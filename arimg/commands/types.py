"""Option values that click does not know: sizes, intervals, windows."""

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


class WindowWidth(click.ParamType):
    """"16" -> 16, "auto" -> "auto"."""

    name = "window"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A whole number >= 1, or "auto"."""
        text = str(value)
        if text == "auto":
            return text
        if not re.fullmatch(r"\d{1,6}", text) or int(text) < 1:
            self.fail(f"{text!r} is no window; give a whole number >= 1, for example 16, or auto", param, ctx)
        return int(text)


SIZE = Size()
WINDOW = WindowWidth()
INTERVAL = Interval()
