"""`arimg bench startup`. No test asserts a time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from arimg.bench import startup
from arimg.bench.startup import Stage, StartupReport, bench_startup, to_markdown
from arimg.errors import InputError
from tests.toy import toy_folder


def test_page() -> None:
    stages = (Stage("python", 0.02, 0.02), Stage("pixels", 1, None), Stage("whole", 1.02, 2))
    report = StartupReport(("arimg", "sample", "--seed", "7"), 3, stages)
    assert to_markdown(report).splitlines() == [
        "# Where the time of `arimg sample --seed 7` goes", "",
        "Medians of 3 fresh processes, after one that warmed the disk's cache.", "",
        "|  | s | CPU s |", "| --- | ---: | ---: |", "| python | 0.02 | 0.02 |", "| pixels | 1.00 |  |",
        "| whole | 1.02 | 2.00 |"]


def test_faults_of_the_command_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "IMPORTS", {})
    with pytest.raises(InputError, match="^No such option '--no-such-option'; see: arimg sample --help$"):
        bench_startup(["--no-such-option"], 1)


@pytest.mark.slow
def test_stages_add_up(tmp_path: Path) -> None:
    report = bench_startup(["--model", str(toy_folder(tmp_path / "toy")), "--class", "cat"], 1)
    *stages, whole = report.stages
    assert [stage.name for stage in stages][:4] == ["python", "import torch", "import arimg", "control"]
    assert sum(stage.seconds for stage in stages) == pytest.approx(whole.seconds) and whole.name == "whole"
    assert json.dumps(asdict(report))
