"""Edge scores on maps drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from arimg.control.base import AsIs
from arimg.evals.control_metrics import (Region, canny_edges, dilate, edge_scores, extracted, lines_of_maps,
                                         map_differences)


def drawn(*rows: str) -> np.ndarray:
    """edges_NHW of one picture: '#' is an edge."""
    return np.array([[character == "#" for character in row] for row in rows])[None]


def scores(painted: np.ndarray, given: np.ndarray, region: Region = Region()) -> tuple[float, ...]:
    return tuple(float(values[0]) for values in edge_scores(painted, given, region))


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
    assert map_differences(painted, given, AsIs()).tolist() == [12, 10]


def test_extracted_keeps_the_order() -> None:
    pictures = np.arange(3, dtype=np.uint8).repeat(2 * 2 * 3).reshape(3, 2, 2, 3)
    assert np.array_equal(extracted(pictures, AsIs()), pictures)
    assert isinstance(AsIs()(Image.fromarray(pictures[0])), Image.Image)
