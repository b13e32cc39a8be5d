"""`arimg eval all`: every row once, resumable, and the place of its table in a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from arimg.cli import main
from arimg.errors import InputError
from arimg.evals import table
from arimg.registry import DECODERS, EXTRACTORS
from tests.toy import CLASSES, CONTROL, toy_pipeline
from tests.train.toy_emoji import write_toy_emoji

SIZE = 16


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model of two types of map and its data; of the decoders one does not fit."""
    monkeypatch.setitem(EXTRACTORS.entries, "effnet_lite0", "tests.evals.fake:FakeExtractor")
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path / "home"))
    for name in set(DECODERS.entries) - {"ar", "jacobi", "scd"}:
        monkeypatch.delitem(DECODERS.entries, name)
    monkeypatch.setitem(DECODERS.entries, "unfit", "tests.evals.test_table:Unfit")
    pipe = toy_pipeline(control=replace(CONTROL, types=("canny", "lineart")))
    pipe.settings = replace(pipe.settings, class_names=("toy/even", "toy/odd", CLASSES[2]))
    pipe.save_pretrained(tmp_path / "model")
    data = write_toy_emoji(tmp_path / "data", count=24, size=SIZE)
    monkeypatch.chdir(tmp_path)
    return ["--model", str(tmp_path / "model"), "--data", str(data), "-n", "5", "--batch", "3", "--device", "cpu"]


class Unfit:
    """Fits no model."""

    guarantee = "same-law"

    def decode(self, target: object, request: object, on_step: object = None) -> None:
        raise InputError("this decoder wants another model")


def eval_all(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["eval", "all", *arguments])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def test_every_part_has_its_row(places: list[str]) -> None:
    eval_all(*places, "--json", "all.json", "--markdown", "all.md")
    report = json.loads(Path("all.json").read_text())
    rows = report["results"]
    assert list(rows) == ["tokenizer", "originals", "classes alone", "control canny", "control lineart", "decoder ar",
                          "decoder jacobi", "decoder scd"]
    assert report["protocol"]["left_out"] == {"decoder unfit": "this decoder wants another model"}
    assert {"psnr", "usage", "fd_fake", "kid_fake"} <= set(rows["tokenizer"])
    assert {"f1", "f1_exact", "fd_fake", "forward_passes", "seconds_per_picture"} <= set(rows["control canny"])
    assert {"map_difference", "ms_ssim_1_scales"} <= set(rows["control lineart"])
    assert "f1" not in rows["classes alone"] and rows["classes alone"]["fd_fake"]["value"] > 0
    assert rows["decoder ar"]["as_ar"]["value"] == rows["decoder jacobi"]["as_ar"]["value"] == 1
    assert rows["decoder jacobi"]["fd_fake"] == rows["decoder ar"]["fd_fake"] == rows["control canny"]["fd_fake"]
    assert rows["decoder jacobi"]["forward_passes"]["value"] < rows["decoder ar"]["forward_passes"]["value"] == 16
    page = Path("all.md").read_text()
    assert page.startswith("`arimg eval all --model ") and "| decoder scd |" in page
    assert page.endswith("- left out: decoder unfit (this decoder wants another model)\n")


def test_finished_rows_are_not_measured_again(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the sixth row leaves five; the second run begins with the sixth."""
    measured: list[str] = []
    paint = table.Table._paint

    def counting(self: table.Table, title: str, *arguments: object, **options: object) -> object:
        measured.append(title)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return paint(self, title, *arguments, **options)                    # type: ignore[arg-type]

    monkeypatch.setattr(table.Table, "_paint", counting)
    assert "interrupted" in eval_all(*places, "--json", "all.json", code=130).stderr
    assert measured == ["classes alone", "canny", "lineart", "ar"] and not Path("all.json").exists()
    eval_all(*places, "--json", "all.json")
    assert measured[4:6] == ["ar", "ar"] and "canny" not in measured[4:]
    assert len(json.loads(Path("all.json").read_text())["results"]) == 8


def test_the_table_goes_between_the_marked_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{table.BEGIN}\nold\n{table.END}\n\nThe rest.\n")
    table.write_markdown(page, "new")
    assert page.read_text() == f"# Title\n\n{table.BEGIN}\nnew\n{table.END}\n\nThe rest.\n"
    table.write_markdown(tmp_path / "other.md", "new")
    assert (tmp_path / "other.md").read_text() == "new\n"


def test_a_page_without_the_lines_is_not_overwritten(places: list[str]) -> None:
    Path("page.md").write_text("mine\n")
    line = eval_all(*places, "--markdown", "page.md", code=2).stderr
    assert "page.md: exists without the lines" in line and Path("page.md").read_text() == "mine\n"
    assert not list(Path("home").rglob("*.json")), "before the long work"


def test_the_docs_have_a_place_for_the_table() -> None:
    table.check_markdown(Path(__file__).parents[2] / "docs/evaluation.md")
