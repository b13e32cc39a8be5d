"""Colour regions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from arimg.control import base
from arimg.control.color import cluster
from arimg.errors import InputError


def regions(image: Image.Image, **options) -> np.ndarray:
    return np.array(base.build("color", **options)(image))


def colors(map_HW3: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(color) for color in map_HW3.reshape(-1, 3).tolist()}


@pytest.fixture
def flag() -> Image.Image:
    image = Image.new("RGB", (90, 60), "white")
    image.paste((200, 16, 46), (0, 0, 30, 60))
    image.paste((0, 36, 125), (60, 0, 90, 60))
    return image


def test_flat_colours_stay_as_they_are(flag):
    np.testing.assert_array_equal(regions(flag), np.array(flag))


def test_shades_become_one_region_and_edges_stay(flag):
    noise = np.random.default_rng(0).normal(0, 6, (60, 90, 3))
    noisy = Image.fromarray((np.array(flag) + noise).clip(0, 255).astype(np.uint8))
    flat = regions(noisy)
    assert len(colors(flat)) == 3
    assert np.abs(flat.astype(int) - np.array(flag)).max() <= 16


def test_never_more_colours_than_asked_for():
    photo = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    photo = Image.fromarray(photo).resize((64, 48), Image.Resampling.BICUBIC)
    counts = [len(colors(regions(photo, colors=k))) for k in (1, 2, 5, 12)]
    assert counts[0] == 1 and counts[1] == 2 and 3 <= counts[2] <= 5 and counts[2] < counts[3] <= 12


def test_specks_and_seams_vanish(flag):
    flag.putpixel((45, 30), (0, 0, 0))
    flag.paste((100, 26, 85), (30, 0, 31, 60))      # as antialiasing leaves them
    assert colors(regions(flag)) == {(255, 255, 255), (200, 16, 46), (0, 36, 125)}


def test_small_details_stay_when_asked_for(flag):
    flag.paste((0, 0, 0), (44, 29, 46, 31))
    assert (0, 0, 0) in colors(regions(flag, detail=0)) and (0, 0, 0) not in colors(regions(flag, detail=0.1))


def test_the_same_picture_gives_the_same_map(flag):
    assert base.build("color")(flag).tobytes() == base.build("color")(flag).tobytes()


def test_nothing_here_is_white_and_colours_do_not_blend(flag):
    kind = base.get_type("color")
    assert kind.background == (255, 255, 255) and kind.resample == "nearest"
    assert colors(np.array(kind.fit(flag, (64, 64)))) == colors(np.array(flag))


def test_heavy_colours_get_clusters_before_rare_ones():
    points = np.array([[255.0] * 3, [200.0] * 3, [0.0, 0.0, 255.0]])
    labels, palette = cluster(points, np.array([1000, 500, 1]), 2)
    assert labels.tolist() == [0, 1, 1] and palette.tolist() == [[255] * 3, [200] * 3]


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (7, 5)])
def test_any_size(size):
    image = Image.new("L", size, 77)
    assert base.build("color")(image).size == size and colors(regions(image)) == {(77, 77, 77)}


@pytest.mark.parametrize("options, message", [
    ({"colors": 0}, "color colors is 0"), ({"colors": 65}, "color colors is 65"), ({"colors": "few"}, "is 'few'"),
    ({"detail": 0.5}, "color detail is 0.5"), ({"detail": -1}, "color detail is -1"),
])
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        base.build("color", **options)
