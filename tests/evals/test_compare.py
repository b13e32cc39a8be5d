"""Reports side by side: like ones only."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from arimg.cli import main
from arimg.evals.bootstrap import Figure
from arimg.evals.report import Report, figure_from_json, plain_figures

FIRST: dict[str, Any] = {
    "protocol": {"evaluation": "imagenet", "number": 100, "seed": 0, "model": "a", "versions": {"torch": "2.14"},
                 "options": {"decoder": "ar", "cfg": 2.0}, "extractor": {"name": "toy"}},
    "results": {"samples": {"fd_toy": {"value": 5.0, "interval": [4.0, 6.0]}, "pictures": {"value": 100.0},
                            "only_here": {"value": 1.0}, "none": {"value": None, "interval": [None, None]}}},
}


def second(**protocol: Any) -> dict[str, Any]:
    other = copy.deepcopy(FIRST)
    other["protocol"].update({"model": "b", "options": {"decoder": "jacobi", "cfg": 2.0}, **protocol})
    other["results"]["samples"]["fd_toy"] = {"value": 3.0, "interval": [2.5, 3.75]}
    del other["results"]["samples"]["only_here"]
    return other


def compared(tmp_path: Path, first: Any, other: Any, code: int = 0) -> Result:
    for name, report in (("a.json", first), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(report))
    result = CliRunner().invoke(main, ["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert result.exit_code == code, result.stderr
    return result


def test_differences_with_intervals_and_what_differs_in_the_subject(tmp_path: Path) -> None:
    """-2, with sqrt(0.5^2 + 1^2) below and sqrt(0.75^2 + 1^2) above."""
    assert compared(tmp_path, FIRST, second()).stdout.splitlines() == [
        "| set | metric | first | second | difference |", "| --- | --- | --- | --- | --- |",
        "| samples | fd_toy | 5 | 3 | -2 [-3.118, -0.75] |", "| samples | pictures | 100 | 100 | +0 |",
        "", "- model: a / b", "- options.decoder: ar / jacobi"]


@pytest.mark.parametrize(("change", "named"), [
    ({"number": 50}, "number: 100 / 50"),
    ({"seed": 1, "number": 50}, "number: 100 / 50; seed: 0 / 1"),
    ({"extractor": {"name": "inception"}}, "extractor.name: toy / inception"),
    ({"reference": {"sha256": "f"}}, "reference.sha256: (not there) / f"),
])
def test_unlike_protocols_are_refused_and_the_keys_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    line = compared(tmp_path, FIRST, second(**change), code=2).stderr
    assert f"the protocols differ, so the figures do not compare: {named}; measure both alike" in line


def test_other_versions_are_named_and_allowed(tmp_path: Path) -> None:
    page = compared(tmp_path, FIRST, second(versions={"torch": "2.15"})).stdout
    assert "- versions.torch: 2.14 / 2.15" in page


def test_reports_without_a_common_figure_are_refused(tmp_path: Path) -> None:
    other = second()
    other["results"] = {"others": other["results"]["samples"]}
    line = compared(tmp_path, FIRST, other, code=2).stderr
    assert "no figure in common: one has samples, the other others" in line


def test_many_differences_are_counted(tmp_path: Path) -> None:
    line = compared(tmp_path, FIRST, second(**{f"key{k}": "x" * 60 for k in range(12)}), code=2).stderr
    assert "and 4 more" in line and "x" * 41 not in line and line.count("\n") == 1


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON"), ("[]", "is no report of arimg eval"), ('{"protocol": {}}', "is no report"),
    ('{"protocol": {}, "results": {"a": 3}}', "is no report"),
    ('{"protocol": {}, "results": {"a": {"b": {}}}}', "is no report"),
])
def test_files_that_are_no_reports(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    result = CliRunner().invoke(main, ["eval", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert result.exit_code == 2 and message in result.stderr
    missing = CliRunner().invoke(main, ["eval", "compare", str(tmp_path / "none.json"), str(tmp_path / "b.json")])
    assert "no such file; give a report written with --json" in missing.stderr


def test_figures_come_back_from_json() -> None:
    figures = {"a": Figure(1.5, 1.0, 2.0), "b": 3.0}
    report = Report({}, {"set": figures}).as_json()["results"]["set"]
    assert {name: figure_from_json(found) for name, found in report.items()} == figures
    lost = figure_from_json(plain_figures({"x": Figure(float("nan"), float("nan"), 1.0)})["x"])
    assert isinstance(lost, Figure) and lost.value != lost.value and lost.high == 1.0
