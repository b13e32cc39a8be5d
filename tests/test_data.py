"""Reading a data folder, and pixels to tensors and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arimg import images
from arimg.data import load_emoji, to_images, to_pixels
from arimg.errors import InputError
from tests.train.toy_emoji import write_toy_emoji


def test_load_emoji(tmp_path: Path) -> None:
    emoji = load_emoji(write_toy_emoji(tmp_path / "toy"))
    assert emoji.images.shape == (12, 16, 16, 3) and not emoji.images.flags.writeable
    assert emoji.labels.tolist() == [0, 1] * 6 and emoji.held_out.nonzero()[0].tolist() == [3, 7, 11]
    assert emoji.class_names == ("toy/even", "toy/odd") and emoji.names[3] == "square-3"
    assert emoji.fingerprint == load_emoji(tmp_path / "toy").fingerprint


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `arimg data emoji --out"):
        load_emoji(tmp_path)
    folder = write_toy_emoji(tmp_path / "toy")
    np.save(folder / "images.npy", np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match="no complete emoji data set"):
        load_emoji(folder)


def test_pixels_and_tensors_agree_with_the_door_for_pictures() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    tensors = to_images(pixels)
    assert np.array_equal(to_pixels(tensors), pixels)
    rough = tensors * 1.1 + 0.013
    assert np.array_equal(to_pixels(rough)[1], np.asarray(images.to_pil(rough[1])))
