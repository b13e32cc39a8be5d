"""Edge scores on maps drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.control.base import AsIs
from arimg.errors import MissingExtraError
from arimg.evals.control_metrics import (Region, canny_edges, check_map_scores, dilate, edge_scores, extracted,
                                         lines_of_maps, map_differences, map_scores, mean_iou, ms_ssim, rmse,
                                         ssim_scales)


def drawn(*rows: str) -> np.ndarray:
    """edges_NHW of one picture: '#' is an edge."""
    return np.array([[character == "#" for character in row] for row in rows])[None]


def scores(painted: np.ndarray, given: np.ndarray, region: Region = Region()) -> tuple[float, ...]:
    """F1, precision and recall."""
    return tuple(float(values[0]) for values in edge_scores(painted, given, region))[:3]


NOTHING = drawn("......", "......", "......", "......")
LINE = drawn(".#....", ".#....", ".#....", ".#....")


def test_dilation_is_the_3x3_neighbourhood() -> None:
    found = dilate(drawn("#....", ".....", "....#", "....."))
    assert np.array_equal(found, drawn("##...", "##.##", "...##", "...##"))


def test_a_line_one_pixel_off_is_right_and_two_pixels_off_is_wrong() -> None:
    assert scores(np.roll(LINE, 1, axis=2), LINE) == (1, 1, 1)
    assert scores(np.roll(LINE, 2, axis=2), LINE) == (0, 0, 0)


def test_precision_and_recall_count_their_own_pixels() -> None:
    """Seven painted pixels, one of them at the line; two of the line's four pixels are near it."""
    painted = drawn(".#..##", "....##", "....##", "......")
    assert scores(painted, LINE) == pytest.approx((2 * (1 / 7) * 0.5 / (1 / 7 + 0.5), 1 / 7, 0.5))
    assert scores(LINE, painted) == pytest.approx((2 * (1 / 7) * 0.5 / (1 / 7 + 0.5), 0.5, 1 / 7))


def test_pictures_without_edges() -> None:
    assert scores(NOTHING, NOTHING) == (1, 1, 1)
    assert scores(NOTHING, LINE) == (0, 0, 0)
    assert scores(LINE, NOTHING) == (0, 0, 0)


def test_one_value_per_picture() -> None:
    found = edge_scores(np.concatenate([LINE, NOTHING]), np.concatenate([LINE, LINE]))
    assert found.f1.tolist() == [1, 0]


def test_a_region_counts_its_own_edges_and_looks_one_pixel_beyond() -> None:
    given = drawn("...#..", "...#..", "...#..", "......")
    painted = drawn("..#..#", "..#..#", "..#..#", "......")
    left, right, top = Region(right=0.5), Region(left=0.5), Region(bottom=0.5)
    assert scores(painted, given, top) == pytest.approx((2 * 0.5 / 1.5, 0.5, 1))
    assert scores(painted, given, right) == (0, 0, 1)          # what is painted there is wrong; the line was found
    assert scores(painted, given, left) == (0, 0, 0)           # no given edge inside
    assert scores(NOTHING, given, left) == (1, 1, 1)


def test_canny_edges_are_those_of_the_control_type() -> None:
    picture = np.full((16, 16, 3), 255, np.uint8)
    picture[4:12, 4:12] = 0
    edges = canny_edges(np.stack([picture, np.full_like(picture, 255)]))
    assert edges.dtype == bool and edges[0].sum() > 20 and not edges[1].any()


def test_lines_of_maps() -> None:
    maps = np.zeros((1, 8, 8, 3), np.uint8)
    maps[0, 3, :, :] = 128
    maps[0, 5, :, :] = 127
    assert lines_of_maps(maps, "canny")[0].sum(1).tolist() == [0, 0, 0, 8, 0, 0, 0, 0]
    colours = np.full((1, 16, 16, 3), 255, np.uint8)
    colours[0, :, 8:] = (200, 0, 0)
    assert np.array_equal(lines_of_maps(colours, "color"), canny_edges(colours))


def test_map_differences_are_grey_levels() -> None:
    given = np.full((2, 4, 4, 3), 100, np.uint8)
    painted = given.copy()
    painted[0] += 12
    painted[1, :, :2, 0] -= 60
    assert map_differences(painted, given).tolist() == [12, 10]


def test_extracted_keeps_the_order() -> None:
    pictures = np.arange(3, dtype=np.uint8).repeat(2 * 2 * 3).reshape(3, 2, 2, 3)
    assert np.array_equal(extracted(pictures, AsIs()), pictures)
    assert isinstance(AsIs()(Image.fromarray(pictures[0])), Image.Image)


def test_exact_f1_has_no_tolerance() -> None:
    assert edge_scores(np.roll(LINE, 1, axis=2), LINE).f1_exact.tolist() == [0]
    half = LINE.copy()
    half[0, 2:] = False                                         # precision 1, recall 1/2
    found = edge_scores(np.concatenate([LINE, half, NOTHING]), np.concatenate([LINE, LINE, NOTHING]))
    assert found.f1_exact == pytest.approx([1, 2 / 3, 1])


def test_rmse_is_per_picture() -> None:
    given = np.full((2, 4, 4, 3), 100, np.uint8)
    found = given.copy()
    found[0] += 30
    found[1, :2] -= 40                                          # half of the pixels
    assert rmse(found, given) == pytest.approx([30, 40 * 0.5 ** 0.5])
    assert map_scores("depth", found, given)["rmse"].value == pytest.approx((30 + 40 * 0.5 ** 0.5) / 2)


def test_ms_ssim_is_torchmetrics_own_on_a_range_of_one() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    found = np.clip(given.astype(int) + rng.integers(-40, 40, given.shape), 0, 255).astype(np.uint8)
    pair = [torch.from_numpy(one).movedim(-1, 1).float() / 255 for one in (found, given)]
    theirs = torchmetrics.multiscale_structural_similarity_index_measure(*pair, data_range=1.0)
    scores = map_scores("hed", found, given)
    assert scores["ms_ssim"].value == pytest.approx(float(theirs), rel=1e-5) and 0.5 < scores["ms_ssim"].value < 1
    assert map_scores("hed", given, given)["ms_ssim"].value == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("side", "scales"), [(10, 0), (11, 1), (16, 1), (22, 2), (44, 3), (98, 3), (128, 4), (175, 4),
                                              (176, 5), (512, 5)])
def test_scales_that_fit(side: int, scales: int) -> None:
    assert ssim_scales(side) == scales
    if scales:
        maps = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
        assert ms_ssim(maps, maps, scales) == pytest.approx(1, rel=1e-4)


def test_mean_iou_by_hand() -> None:
    """Red: 2 of 4 pixels found, none wrong: 1/2. Green: 4 found, 2 of them red's: 4/6. Blue is found where nothing is
    labelled, which does not count, and once in green's place: 0/1 is a class of its own."""
    red, green, blue, none = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
    given = np.array([[[red] * 4, [green] * 4, [none] * 4]], np.uint8)
    found = np.array([[[red, red, green, green], [green] * 4, [blue] * 4]], np.uint8)
    assert mean_iou(found, given).value == pytest.approx((2 / 4 + 4 / 6) / 2)
    found[0, 1, 0] = blue
    assert mean_iou(found, given).value == pytest.approx((2 / 4 + 3 / 6 + 0) / 3)
    assert mean_iou(given, given).value == 1
    assert np.isnan(mean_iou(given, np.zeros_like(given)).value)


def test_mean_iou_sums_over_pictures_before_it_divides() -> None:
    red, green = (255, 0, 0), (0, 255, 0)
    given = np.array([[[red, red]], [[red, green]]], np.uint8)
    found = np.array([[[red, green]], [[red, green]]], np.uint8)
    assert mean_iou(found, given).value == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_ms_ssim_without_torchmetrics_is_one_line_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arimg.evals.control_metrics.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"MS-SSIM needs torchmetrics.*arimg\[eval\]"):
        check_map_scores("lineart")
    check_map_scores("canny")
