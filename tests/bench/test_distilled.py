"""`arimg bench distilled` at toy size. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from arimg.bench import distilled
from arimg.cli import main
from tests.models.toy import SIZES


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(distilled.SHAPES, "toy", {**SIZES, "vocab_size": 48, "inject_layers": ()})
    monkeypatch.setattr(distilled, "GRID", (4, 4))


def test_the_page_and_the_file(tmp_path: Path) -> None:
    arguments = ["--shape", "toy", "--batch", "1", "--batch", "2", "--cfg", "2", "--repeats", "1"]
    result = CliRunner().invoke(main, ["bench", "distilled", *arguments, "--json", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stdout.startswith("# One pass of a student") and result.stdout.count("| toy |") == 4
    assert "`aten::" in result.stdout
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 2] and 1.9 < rows[1]["flops"] / rows[0]["flops"] < 2.1
    weights = sum(parameter.numel() for parameter in distilled.networks("toy", torch.device("cpu"), torch.float32)[1]
                  .backbone.layers.parameters() if parameter.ndim == 2)
    assert rows[0]["flops"] > 2 * 17 * weights


def test_an_unknown_shape() -> None:
    result = CliRunner().invoke(main, ["bench", "distilled", "--shape", "emojy"])
    assert result.exit_code == 2 and "did you mean emoji" in result.stderr and result.stderr.count("\n") == 1
