"""Batches are functions of (seed, step)."""

import numpy as np
import torch

from arimg.data import to_images
from arimg.train.data import balanced_indices, batch_rng, random_crops


def test_a_batch_is_a_function_of_seed_step_and_rank():
    draws = [batch_rng(*key).integers(0, 1000, 5).tolist() for key in ((0, 1), (0, 1), (0, 2), (1, 1), (0, 1, 1))]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


def test_crops_are_windows_of_their_image():
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    crops = random_crops(pixels, np.array([1, 0]), 4, np.random.default_rng(0))
    for index, crop in zip((1, 0), crops):
        windows = [pixels[index, top:top + 4, left:left + 4] for top in range(5) for left in range(5)]
        assert any(np.array_equal(crop, w) or np.array_equal(crop, w[:, ::-1]) for w in windows)


def test_balanced_indices_give_a_class_the_square_root_of_its_share():
    labels = np.array([0] * 90 + [1] * 10)
    drawn = labels[balanced_indices(labels, 20_000, np.random.default_rng(0))]
    assert abs(drawn.mean() - 10 ** 0.5 / (10 ** 0.5 + 90 ** 0.5)) < 0.02


def test_to_images_maps_bytes_to_minus_one_and_one():
    images = to_images(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1).repeat(3, -1))
    assert images.shape == (2, 3, 1, 1)
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([-1.0, 1.0]))
