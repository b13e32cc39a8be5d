"""Canny edges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from arimg.control import base
from arimg.errors import InputError


@pytest.fixture
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 2))


def test_edges_of_the_three_channel_picture_as_in_controlar(photo):
    edges = np.array(base.build("canny", low=20, high=40)(photo))
    assert edges.shape == (48, 64, 3) and set(np.unique(edges)) == {0, 255}
    np.testing.assert_array_equal(edges[..., 0], cv2.Canny(np.array(photo), 20, 40))
    assert (edges[..., 0] != cv2.Canny(np.array(photo.convert("L")), 20, 40)).any()
    assert (edges == edges[..., :1]).all()


def test_default_thresholds_are_100_and_200(photo):
    assert base.build("canny")(photo).tobytes() == base.build("canny", low=100, high="200")(photo).tobytes()
    assert (base.build("canny").low, base.build("canny").high) == (100, 200)


def test_lower_thresholds_find_more(photo):
    few, many = (np.array(base.build("canny", low=t, high=2 * t)(photo)).sum() for t in (60, 15))
    assert few < many


def test_a_blank_picture_has_no_edges():
    assert not np.array(base.build("canny")(Image.new("RGB", (16, 16), "red"))).any()
    assert base.build("canny")(Image.new("L", (1, 1))).size == (1, 1)


@pytest.mark.parametrize("options, message", [
    ({"low": -1}, "canny low is -1"), ({"high": 5000}, "canny high is 5000"), ({"low": "x"}, "canny low is 'x'"),
    ({"low": 201}, "canny low is 201, above canny high 200"), ({"high": float("nan")}, "canny high is nan"),
])
def test_wrong_thresholds(options, message):
    with pytest.raises(InputError, match=message):
        base.build("canny", **options)
