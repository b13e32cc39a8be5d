"""`arimg bench continuous`: the rows there should be, their counts, and the two formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from arimg.accel.masked import Masked
from arimg.bench.continuous import bench_continuous, expected, textbook, to_markdown
from arimg.cli import main
from arimg.errors import InputError
from tests.models.toy_continuous import nearby
from tests.toy import toy_pipeline
from tests.toy_continuous import toy_continuous_pipeline


def test_rows_of_mar_with_a_draft() -> None:
    pipe = toy_continuous_pipeline("masked")
    report = bench_continuous(pipe, nearby(pipe.transformer), [2], 8, 2.0, 2, 1)
    rows = {row.decoder: row for row in report.rows}
    plain, relaxed = rows["plain, 8 steps"], rows["cspd-relaxed W=2"]
    assert plain.passes == 8 and plain.draft_passes == 0 and math.isnan(plain.acceptance)
    assert plain.head_evaluations == 32 * 5
    assert relaxed.passes == 1 + 4 and relaxed.draft_passes == 7 and relaxed.guarantee == "none"
    assert relaxed.head_evaluations == (32 + 32 - 2) * 5, "the target reads all, the draft all but step 1"
    assert rows["plain, 5 steps"].passes == 5, "the target alone, as often as it is asked in the relaxed scheme"
    assert plain.guarantee == "same-law" and rows["plain, 5 steps"].guarantee == "none", "fewer steps, another law"
    assert rows["cspd W=2"].guarantee == "same-law" and 0 <= rows["cspd W=2"].acceptance <= 1
    page = to_markdown(report)
    assert all(f"`{name}`" in page for name in rows)


def test_a_draft_step_is_timed_like_one_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, asked, decode = toy_continuous_pipeline("masked"), set[tuple[bool, int | None]](), Masked.decode
    draft = nearby(pipe.transformer)

    def noted(self: Masked, target: Any, request: Any, *rest: Any) -> Any:
        asked.add((target.backbone is draft, request.steps))
        return decode(self, target, request, *rest)
    monkeypatch.setattr(Masked, "decode", noted)
    bench_continuous(pipe, draft, [], 4, 2.0, 2, 1)
    assert asked == {(False, 4), (True, 4)}


def test_rows_of_the_causal_model_without_a_draft() -> None:
    report = bench_continuous(toy_continuous_pipeline("causal"), None, [4], None, None, 1, 1)
    assert [row.decoder for row in report.rows] == ["plain, 16 steps", "jacobi-continuous W=4"]
    assert math.isnan(report.draft_cost)


def test_the_formula_gives_the_published_speed_ups() -> None:
    """Spec, section 2.4: 5 % by the target, one cost ratio per pair for all windows."""
    published = {0.355: (1.62, 1.96, 2.20, 2.33), 0.60: (1.18, 1.33, 1.46, 1.53), 0.62: (1.15, 1.32, 1.42, 1.49)}
    for cost, values in published.items():
        for window, value in zip((4, 8, 16, 32), values):
            assert abs(expected(256, 13, window, cost) - value) < 0.07
    assert abs(textbook(0.30, 4, 0.355) - 0.57) < 0.03 and textbook(1.0, 4, 0.25) == 2.5


def test_steps_of_a_causal_model_are_refused() -> None:
    with pytest.raises(InputError, match="--steps 3: this model paints token by token"):
        bench_continuous(toy_continuous_pipeline("causal"), None, [4], 3, None, 1, 1)


def test_models_with_codes_are_refused() -> None:
    with pytest.raises(InputError, match="bench decode"):
        bench_continuous(toy_pipeline(), None, [4], None, None, 1, 1)


def test_command(tmp_path: Path) -> None:
    folder = toy_continuous_pipeline("causal").save_pretrained(tmp_path / "model")
    out = CliRunner().invoke(main, ["bench", "continuous", "--model", str(folder), "--window", "4", "-n", "1",
                                    "--repeats", "1", "--dtype", "float32", "--json", str(tmp_path / "out.json")])
    assert out.exit_code == 0, out.output
    assert "jacobi-continuous" in out.output
    assert json.loads((tmp_path / "out.json").read_text())["draft_cost"] is None
