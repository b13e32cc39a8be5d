"""PSNR of known errors, codebook usage, and a tokenizer that returns what it was given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from arimg.evals.tokenizer_metrics import HIGHEST_PSNR, masked_psnr, perplexity, psnr, reconstruct, usage
from arimg.tokenizers.base import Encoded


def test_psnr_of_a_constant_error() -> None:
    original = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(original + np.uint8(10), original) == pytest.approx([20 * np.log10(25.5)] * 2, abs=1e-6)
    assert psnr(original - np.uint8(10), original) == pytest.approx([20 * np.log10(25.5)] * 2, abs=1e-6)
    assert psnr(original, original).tolist() == [HIGHEST_PSNR] * 2


def test_psnr_is_per_picture() -> None:
    original = np.full((2, 4, 4, 3), 100, np.uint8)
    other = original.copy()
    other[0, 0, 0, 0] = 148                                     # MSE 48^2 / 48 = 48
    assert psnr(other, original) == pytest.approx([10 * np.log10(255 ** 2 / 48), HIGHEST_PSNR], abs=1e-6)


def test_masked_psnr_looks_at_what_is_not_white_in_the_original() -> None:
    original = np.full((3, 4, 4, 3), 255, np.uint8)
    original[0, :2] = 100                                       # 8 of 16 pixels
    original[1, 0, 0] = (255, 255, 249)                         # one pixel, by one channel
    original[1, 0, 1] = 250                                     # ground
    painted = original.copy()
    painted[0, :2] += 10
    painted[0, 2:] = 0                                          # on the ground: not counted
    painted[1, 0, 0, 2] -= 30
    expected = [20 * np.log10(25.5), 10 * np.log10(255 ** 2 / 300), np.nan]
    assert masked_psnr(painted, original) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_usage_and_perplexity() -> None:
    codes = np.array([[0, 0, 3, 3], [5, 5, 7, 7]])
    counts = np.bincount(codes.flatten(), minlength=16)
    assert usage(counts) == 0.25
    assert perplexity(counts) == pytest.approx(4)
    assert perplexity(np.array([8, 0])) == 1


class Copy:
    """Remembers what it encoded last."""

    stride, vocab_size = 4, 8

    def encode(self, images_B3HW: Tensor) -> Encoded:
        self.images = images_B3HW
        return Encoded(torch.arange(len(images_B3HW))[:, None], images_B3HW, (1, 1))

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.images


def test_reconstruct_goes_in_batches_and_is_exact() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (19, 4, 4, 3), dtype=np.uint8)
    assert np.array_equal(reconstruct(Copy(), pictures), pictures)
