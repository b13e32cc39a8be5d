"""Soft edges without a network."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from arimg.control import base
from arimg.errors import InputError


def edges(image: Image.Image, **options) -> np.ndarray:
    map_HW3 = np.array(base.build("softedge", **options)(image))
    assert map_HW3.dtype == np.uint8 and (map_HW3 == map_HW3[..., :1]).all()
    return map_HW3[..., 0].astype(int)


@pytest.fixture
def step() -> Image.Image:
    image = Image.new("RGB", (60, 30), "white")
    image.paste("navy", (30, 0, 60, 30))
    return image


def test_an_edge_is_a_white_band_on_black_that_fades(step):
    row = edges(step)[15]
    assert row[29] == row[30] == 255 and row[:24].max() == row[36:].max() == 0
    assert 0 < row[27] < row[28] <= 255, "grey levels"


def test_larger_sigma_gives_broader_bands(step):
    assert (edges(step, sigma=1) > 40).sum() < (edges(step, sigma=3) > 40).sum()


def test_gain_brings_out_weak_edges(step):
    step.paste((230, 230, 255), (5, 5, 20, 25))
    weak = [edges(step, gain=gain)[15, 5] for gain in (1, 3)]
    assert 0 < weak[0] and weak[1] > 2 * weak[0]


def test_edges_between_colours_of_one_brightness_count():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 130, 0), (20, 0, 40, 20))
    assert edges(image)[10, 20] == 255


def test_blank_and_nearly_blank_pictures_stay_dark():
    assert not edges(Image.new("RGB", (16, 16), "gray")).any()
    noise = np.random.default_rng(0).integers(126, 130, (32, 32, 3), dtype=np.uint8)
    assert edges(Image.fromarray(noise)).max() < 64
    assert edges(Image.new("L", (1, 1))).shape == (1, 1)


@pytest.mark.parametrize("options, message", [
    ({"sigma": 0}, "softedge sigma is 0"), ({"sigma": "wide"}, "softedge sigma is 'wide'"),
    ({"gain": -1}, "softedge gain is -1"), ({"gain": float("nan")}, "softedge gain is nan"),
])
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        base.build("softedge", **options)
