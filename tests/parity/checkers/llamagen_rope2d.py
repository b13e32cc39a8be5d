"""LlamaGen's 2D rotary tables, and a tensor rotated with each table that has one."""

from __future__ import annotations

import torch

from arimg.models.layers import rotary_table_2d, rotate
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all tables of settings.tables; `out.rotated_<i>` is `in.x` (or `in.x_<i>`) turned by table i."""
    for index, entry in enumerate(fixture.settings["tables"]):
        cells_N = torch.arange(entry["grid"] ** 2)
        table_SF2 = rotary_table_2d(cells_N, entry["grid"], entry["head_dim"], entry["base"], entry["prefix"],
                                    identity=False)
        fixture.compare(f"out.table_{index}", table_SF2)
        if f"out.rotated_{index}" in fixture:
            x = fixture[f"in.x_{index}"] if f"in.x_{index}" in fixture else fixture["in.x"]
            fixture.compare(f"out.rotated_{index}", rotate(x, table_SF2[None]))
