"""How much of a picture survives a tokenizer: PSNR, and how much of the codebook is in use.

PSNR = 10 log10(255^2 / MSE) on 8-bit RGB, per picture, then averaged over pictures. The masked PSNR takes the MSE over
the pixels where some channel of the original is below 250: on drawings the white ground, which is easy, would hide what
happens to the thing drawn. A picture without such pixels has no masked PSNR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from arimg.data import to_images, to_pixels
from arimg.tokenizers.base import Tokenizer

WHITE_FROM = 250            # a pixel is ground where all channels of the original reach this value
HIGHEST_PSNR = 100.0        # of a picture without any error
BATCH = 16


class Reconstruction(NamedTuple):
    """Pictures after encoding and decoding."""

    pixels_NHW3: np.ndarray     # uint8
    codes_NL: np.ndarray        # int64


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, pixels_NHW3: np.ndarray, device: torch.device | str = "cpu",
                bar: Callable[[Iterable], Iterable] = iter) -> Reconstruction:
    """Encode and decode uint8 pictures in batches; `bar` wraps the iteration over batches."""
    pixels, codes = [], []
    for start in bar(range(0, len(pixels_NHW3), BATCH)):
        encoded = tokenizer.encode(to_images(pixels_NHW3[start:start + BATCH]).to(device))
        pixels.append(to_pixels(tokenizer.decode_codes(encoded.codes_BL, encoded.grid)))
        codes.append(encoded.codes_BL.cpu().numpy())
    return Reconstruction(np.concatenate(pixels), np.concatenate(codes))


def psnr(pixels_NHW3: np.ndarray, original_NHW3: np.ndarray) -> np.ndarray:
    """psnr_N in dB over whole pictures."""
    return _decibel(_squared_error(pixels_NHW3, original_NHW3).mean((1, 2)))


def masked_psnr(pixels_NHW3: np.ndarray, original_NHW3: np.ndarray) -> np.ndarray:
    """psnr_N in dB over the pixels that are not white in the original; NaN where all are."""
    mask_NHW = original_NHW3.min(-1) < WHITE_FROM
    total_N = (_squared_error(pixels_NHW3, original_NHW3) * mask_NHW).sum((1, 2))
    count_N = mask_NHW.sum((1, 2))
    return np.where(count_N > 0, _decibel(total_N / np.maximum(count_N, 1)), np.nan)


def _squared_error(pixels_NHW3: np.ndarray, original_NHW3: np.ndarray) -> np.ndarray:
    """error_NHW: mean over the channels."""
    return ((pixels_NHW3.astype(np.float32) - original_NHW3) ** 2).mean(-1, dtype=np.float64)


def _decibel(mse_N: np.ndarray) -> np.ndarray:
    lowest = 255 ** 2 / 10 ** (HIGHEST_PSNR / 10)
    return 10 * np.log10(255 ** 2 / np.maximum(mse_N, lowest))


def usage(codes_NL: np.ndarray, vocab_size: int) -> float:
    """The share of the codebook's entries that occur."""
    return len(np.unique(codes_NL)) / vocab_size


def perplexity(codes_NL: np.ndarray) -> float:
    """exp of the entropy of the codes' frequencies: how many equally frequent codes would be as varied."""
    counts = np.unique(codes_NL, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
