"""Batches are functions of (seed, step, micro); epochs are walked through without loss."""

import numpy as np
import pytest
import torch

from arimg.data import to_images
from arimg.errors import ConfigError
from arimg.train.data import Loader, balanced_indices, batch_rng
from arimg.train.data_config import DataConfig
from arimg.train.order import EpochOrder
from arimg.train.sources import EmojiSource, Split
from tests.train.toy_emoji import write_toy_emoji


def test_a_batch_is_a_function_of_seed_step_and_micro():
    draws = [batch_rng(*key).integers(0, 1000, 5).tolist() for key in ((0, 1), (0, 1), (0, 2), (1, 1), (0, 1, 1))]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("sizes", [[1] * 7, [5, 0, 3, 9, 1], [40], [2, 2, 2, 2]])
@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_all_lanes_together_see_every_sample_once_per_epoch(sizes, lanes):
    order, count = EpochOrder(sizes, seed=1, lanes=lanes, window=2), sum(sizes)
    parts = [count * (lane + 1) // lanes - count * lane // lanes for lane in range(lanes)]
    for epoch in range(3):
        seen = [order.lane(lane, epoch * part, part).tolist() for lane, part in zip(range(lanes), parts)]
        assert sorted(sample for lane in seen for sample in lane) == list(range(count))


def test_a_lane_can_be_entered_anywhere():
    order = EpochOrder([10, 10, 10], seed=2, lanes=4, window=1)
    stream = order.lane(1, 0, 50).tolist()
    fresh = EpochOrder([10, 10, 10], seed=2, lanes=4, window=1)
    assert fresh.lane(1, 33, 17).tolist() == stream[33:]
    assert EpochOrder([10, 10, 10], seed=3, lanes=4, window=1).lane(1, 0, 50).tolist() != stream


def test_a_large_set_is_not_permuted_as_a_whole():
    """Only the windows that are read are drawn: 60 million samples are entered in the middle at once."""
    order = EpochOrder([10_000] * 6_000, seed=0, lanes=64, window=16)
    assert len(set(order.lane(63, 500_000, 256).tolist())) == 256


def test_more_lanes_than_samples(tmp_path):
    source = EmojiSource(write_toy_emoji(tmp_path / "toy"))
    with pytest.raises(ConfigError, match="3 samples for 4 micro-batches per step; use fewer processes"):
        Loader(DataConfig(), Split(source, range(3)), 0, lanes=4)


def test_balanced_indices_give_a_class_the_square_root_of_its_share():
    labels = np.array([0] * 90 + [1] * 10)
    drawn = labels[balanced_indices(labels, 20_000, np.random.default_rng(0))]
    assert abs(drawn.mean() - 10 ** 0.5 / (10 ** 0.5 + 90 ** 0.5)) < 0.02


def test_to_images_maps_bytes_to_minus_one_and_one():
    images = to_images(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1, 1).repeat(3, -1))
    assert images.shape == (2, 3, 1, 1)
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([-1.0, 1.0]))
