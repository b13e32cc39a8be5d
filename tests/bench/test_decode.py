"""`arimg bench decode` on a toy pipeline. No test asserts a time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, OnStep
from arimg.accel.target import Target
from arimg.bench.decode import (DecodeReport, Scene, bench_decode, file_scenes, find_decoders, find_scenes,
                                held_out_scenes, request_of, to_markdown, tokens_per_pass, white_tokens)
from arimg.errors import InputError, UnknownNameError
from arimg.pipeline import Pipeline
from arimg.registry import DECODERS, Registry
from tests.toy import SIDE, toy_pipeline
from tests.train.toy_emoji import write_toy_emoji

TOKENS = 16


class Halves:
    """Plain decoding that claims to fix its tokens in two passes, and has a window."""

    guarantee = "same-codes"

    def __init__(self, window: int | str = 4) -> None:
        self.window = window

    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        codes_BL = PlainAR().decode(target, request).codes_BL
        fixed_at = [[1] * (TOKENS // 2) + [2] * (TOKENS // 2)]
        return DecodeResult(DecodeStats(2, (8.0, 8.0), extra={"fixed_at": fixed_at}), codes_BL)


class Zeros:
    """Decodes nothing, and needs a part."""

    guarantee = "none"

    def __init__(self, student: object) -> None:
        self.student = student

    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        return DecodeResult(DecodeStats(1, (float(TOKENS),)), torch.zeros(1, TOKENS, dtype=torch.int64))


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> Registry:
    known = {"halves": f"{__name__}:Halves", "ar": DECODERS.entries["ar"], "zeros": f"{__name__}:Zeros"}
    registry = Registry("decoder", "arimg.no_such_group", known)
    monkeypatch.setattr("arimg.bench.decode.DECODERS", registry)
    monkeypatch.setattr(Registry, "load", lambda self, name: {"halves": Halves, "ar": PlainAR, "zeros": Zeros}[
        self.check(name)])
    return registry


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def report(pipe: Pipeline) -> DecodeReport:
    scenes = [Scene(Image.new("L", (SIDE, SIDE)), "canny", name) for name in ("cat", "dog")]
    return bench_decode(pipe, "toy", scenes, {"ar": PlainAR(), "halves": Halves(), "zeros": Zeros(None)}, [1.0, 2.0],
                        repeats=2)


def test_every_decoder_at_every_guidance_scale(report: DecodeReport) -> None:
    assert [(cost.decoder, cost.cfg) for cost in report.decoders] == [
        (name, cfg) for cfg in (1.0, 2.0) for name in ("ar", "halves", "zeros")]
    assert (report.pictures, report.tokens, report.repeats, report.dtype) == (2, TOKENS, 2, "float32")


def test_passes_and_codes(report: DecodeReport) -> None:
    plain, halves, zeros = report.decoders[:3]
    assert (plain.passes, plain.tokens_per_pass, plain.same_as_plain) == (TOKENS, 1.0, 1.0)
    assert (halves.passes, halves.tokens_per_pass, halves.same_as_plain) == (2, 8.0, 1.0)
    assert (zeros.passes, zeros.tokens_per_pass, zeros.same_as_plain) == (1, TOKENS, 0.0)
    assert all(cost.tokens_per_pass_non_white == cost.tokens_per_pass for cost in report.decoders)    # noise, no white


def test_times_belong_together(report: DecodeReport) -> None:
    for cost in report.decoders:
        assert 0 < cost.seconds_min <= cost.seconds and cost.pixel_seconds > 0
        assert cost.tokens_per_second == pytest.approx(TOKENS / cost.seconds)
    plain, _, zeros = report.decoders[:3]
    guided = report.decoders[3]
    assert zeros.peak_bytes < plain.peak_bytes < guided.peak_bytes      # two branches need more than one


def test_the_audit_tells_who_keeps_the_law(report: DecodeReport) -> None:
    plain, halves, zeros = report.decoders[:3]
    assert plain.audit_lawful and halves.audit_lawful and plain.audit_score == halves.audit_score
    assert not zeros.audit_lawful and zeros.audit_score < -4
    assert "NOT the law" in to_markdown(report)


def test_the_cost_curve_ends_at_the_whole_picture(report: DecodeReport) -> None:
    assert list(report.pass_seconds) == [1.0, 2.0]
    assert all(list(curve) == [1, 2, 4, 8, 16] and min(curve.values()) > 0 for curve in report.pass_seconds.values())


def test_the_page_and_the_file(report: DecodeReport) -> None:
    page = to_markdown(report)
    assert page.startswith("# toy: decoders side by side\n") and page.count("| `ar` |") == 2
    assert "| cfg | 1 | 2 | 4 | 8 | 16 | W = 1, ms |" in page
    assert json.loads(json.dumps(asdict(report)))["decoders"][0]["decoder"] == "ar"


def test_tokens_per_pass_inside_a_mask() -> None:
    stats = DecodeStats(3, extra={"fixed_at": [[1, 2, 2, 2, 3, 3]]})
    first_two = np.array([1, 1, 0, 0, 0, 0], dtype=bool)
    assert tokens_per_pass([stats], [first_two]) == pytest.approx(2 / (1 + 1 / 3))
    assert tokens_per_pass([stats], [np.ones(6, dtype=bool)]) == pytest.approx(6 / 3)
    assert np.isnan(tokens_per_pass([stats], [np.zeros(6, dtype=bool)]))


def test_tokens_per_pass_in_raster_order_without_more_details() -> None:
    assert tokens_per_pass([DecodeStats(2, (1.0, 3.0))], [np.array([0, 1, 1, 1], dtype=bool)]) == pytest.approx(3)


def test_white_tokens_are_white_in_every_pixel() -> None:
    image = torch.ones(3, 4, 6)
    image[0, 0, 0] = 0                      # one channel of one pixel of token 0
    image[:, 3, 5] = (250 - 127.5) / 127.5  # still white, in token 5
    assert white_tokens(image, (2, 3)).tolist() == [False, True, True, True, True, True]


def test_all_decoders_plain_first_without_those_that_need_parts(decoders: Registry) -> None:
    assert list(find_decoders([], [])) == ["ar", "halves"]


def test_a_row_for_every_window(decoders: Registry) -> None:
    found = find_decoders(["halves", "ar"], [2, "auto"])
    assert list(found) == ["halves W=2", "halves W=auto", "ar"]


def test_decoder_faults(decoders: Registry) -> None:
    with pytest.raises(InputError, match="--decoder zeros: needs student"):
        find_decoders(["zeros"], [])
    with pytest.raises(UnknownNameError, match="did you mean halves"):
        find_decoders(["halfs"], [])


def test_held_out_pictures_with_their_maps(pipe: Pipeline, tmp_path: Path) -> None:
    folder = write_toy_emoji(tmp_path / "emoji")
    scenes = find_scenes(pipe, [], folder, 5)
    assert len(scenes) == 5 and scenes == held_out_scenes(pipe, folder, 5)
    assert all(scene.control.size == (16, 16) and scene.control_type == "canny" for scene in scenes)
    assert scenes[0].class_name is None     # "toy/odd" is no class of this model
    assert scenes[0].control.tobytes() == scenes[3].control.tobytes()       # three are held out


def test_without_data_the_examples(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no control images: there is no nowhere"):
        find_scenes(pipe, [], Path("nowhere"), 2)
    Path("examples").mkdir()
    Image.new("L", (3, 5)).save("examples/a.png")
    assert [scene.control.size for scene in find_scenes(pipe, [], Path("nowhere"), 2)] == [(3, 5), (3, 5)]
    Image.new("L", (4, 4)).save("b.png")
    assert find_scenes(pipe, ["b.png"], Path("nowhere"), 1)[0].control.size == (4, 4)
    assert len(file_scenes(pipe, ["b.png"], 3)) == 3


def test_a_model_without_control_paints_without(tmp_path: Path) -> None:
    bare = toy_pipeline(control=None)
    assert find_scenes(bare, [], tmp_path, 2) == [Scene(), Scene()]
    assert request_of(bare, Scene(), 3, 1.0).seeds_B.tolist() == [3]
    with pytest.raises(InputError, match="has no control component"):
        find_scenes(bare, ["x.png"], tmp_path, 1)
