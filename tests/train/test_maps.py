"""Random training maps: functions of the picture and the generator, of the right kind."""

from __future__ import annotations

import numpy as np
import pytest

from arimg.errors import UnknownNameError
from arimg.train import maps
from arimg.train.maps import check_types, random_map

LINES = ("canny", "softedge", "lineart")
TYPES = (*LINES, "color")
DRAWS = 24


@pytest.fixture
def picture() -> np.ndarray:
    """Two coloured squares on white, each touching all four quarters of the 64 x 64 picture."""
    pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
    pixels[8:56, 10:54] = (220, 30, 40)
    pixels[24:40, 22:42] = (20, 40, 160)
    return pixels


def draws(name: str, picture: np.ndarray, count: int = DRAWS) -> list[np.ndarray]:
    return [random_map(name, picture, np.random.default_rng(seed)) for seed in range(count)]


def quarters(map_HW3: np.ndarray) -> list[bool]:
    """Whether each of upper, lower, left, right half holds anything."""
    return [bool(half.any()) for half in (map_HW3[:32], map_HW3[32:], map_HW3[:, :32], map_HW3[:, 32:])]


@pytest.mark.parametrize("name", TYPES)
def test_a_map_is_a_function_of_picture_and_generator(name, picture):
    first, second = draws(name, picture), draws(name, picture)
    assert all(map_.dtype == np.uint8 and map_.shape == (64, 64, 3) for map_ in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert len({map_.tobytes() for map_ in first}) > DRAWS // 4, "drawn at random"


@pytest.mark.parametrize("name", TYPES)
def test_the_picture_is_left_alone_and_may_be_a_mirror_view(name, picture):
    before = picture.copy()
    mirrored = random_map(name, picture[:, ::-1], np.random.default_rng(0))
    assert np.array_equal(mirrored, random_map(name, picture[:, ::-1].copy(), np.random.default_rng(0)))
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("name", TYPES)
def test_no_chance_but_the_generators(name, picture):
    before = np.random.get_state()[1].copy()
    draws(name, picture, 4)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("name", LINES)
def test_lines_are_white_on_black(name, picture):
    for map_HW3 in draws(name, picture):
        assert (map_HW3 == map_HW3[..., :1]).all(), "grey"
        assert map_HW3.max() > 100 and map_HW3.mean() < 128 and not map_HW3[0].any()


def test_canny_maps_have_two_levels_and_strokes_of_several_widths(picture):
    found = draws("canny", picture)
    assert all(set(np.unique(map_HW3)) == {0, 255} for map_HW3 in found)
    assert len({int((map_HW3[20, :32, 0] > 0).sum()) for map_HW3 in found}) >= 3


@pytest.mark.parametrize("name", ("softedge", "lineart"))
def test_grey_lines_have_grey_levels(name, picture):
    assert any(len(np.unique(map_HW3)) > 3 for map_HW3 in draws(name, picture))


@pytest.mark.parametrize("name", LINES)
def test_some_line_maps_have_one_blank_half(name, picture):
    found = [quarters(map_HW3) for map_HW3 in draws(name, picture, 150)]
    blank = [halves for halves in found if not all(halves)]
    assert 4 <= len(blank) <= 30 and all(sum(halves) == 3 for halves in blank)
    assert {halves.index(False) for halves in blank} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", LINES)
def test_a_blank_picture_has_a_black_map(name):
    blank = np.full((16, 16, 3), 200, dtype=np.uint8)
    assert not any(map_HW3.any() for map_HW3 in draws(name, blank, 8))


def test_colour_maps_are_flat_near_the_picture_and_white_where_it_is_white(picture):
    for map_HW3 in draws("color", picture):
        assert len(np.unique(map_HW3.reshape(-1, 3), axis=0)) <= 12
        assert (map_HW3[:6] == 255).all() and (map_HW3[:, :8] == 255).all()
        assert np.abs(map_HW3[12:20, 14:50].astype(int) - (220, 30, 40)).max() < 48


def test_small_pieces_vanish():
    edges = np.zeros((20, 20), dtype=np.uint8)
    edges[5, 2:18] = edges[15, 3:6] = 255
    kept = maps._without_pieces(edges, 4)
    assert (kept[5] == edges[5]).all() and not kept[15].any()


def test_types_without_training_maps_are_named():
    check_types(TYPES)
    with pytest.raises(UnknownNameError, match="unknown control type 'cany'; did you mean canny"):
        check_types(("canny", "cany"))
    with pytest.raises(UnknownNameError, match="control type with training maps 'depth'.*canny"):
        check_types(("depth",))
