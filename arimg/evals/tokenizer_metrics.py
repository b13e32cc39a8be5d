"""How much of a picture survives a tokenizer: PSNR, SSIM, and how much of the codebook is in use.

PSNR = 10 log10(255^2 / MSE) on 8-bit RGB, per picture, then averaged over pictures. The masked PSNR takes the MSE over
the pixels where some channel of the original is below 250: on drawings the white ground, which is easy, would hide what
happens to the thing drawn. A picture without such pixels has no masked PSNR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arimg.data import to_images, to_pixels
from arimg.errors import MissingExtraError
from arimg.evals.control_metrics import SSIM_WINDOW, unit_range

WHITE_FROM = 250            # a pixel is ground where all channels of the original reach this value
HIGHEST_PSNR = 100.0        # of a picture without any error
BATCH = 16


@torch.no_grad()
def reconstruct(tokenizer: Any, pixels_NHW3: np.ndarray, device: torch.device | str = "cpu",
                bar: Callable[[Iterable], Iterable] = iter) -> np.ndarray:
    """pixels_NHW3 uint8 after encoding and decoding, batch by batch; `bar` wraps the iteration over batches."""
    pixels = []
    for start in bar(range(0, len(pixels_NHW3), BATCH)):
        pixels.append(to_pixels(rebuild(tokenizer, to_images(pixels_NHW3[start:start + BATCH]).to(device)).images_B3HW))
    return np.concatenate(pixels)


class Rebuilt(NamedTuple):
    """Pictures after encoding and decoding."""

    images_B3HW: Tensor
    tokens: Tensor          # codes_BL (int64), or latents_BChw of a continuous tokenizer: the posterior's mean


def rebuild(tokenizer: Any, images_B3HW: Tensor) -> Rebuilt:
    """Encode and decode a batch in [-1, 1] with either kind of tokenizer."""
    encoded = tokenizer.encode(images_B3HW)
    if isinstance(encoded, Tensor):
        return Rebuilt(tokenizer.decode(encoded), encoded)
    return Rebuilt(tokenizer.decode_codes(encoded.codes_BL, encoded.grid), encoded.codes_BL)


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


def ssim(pixels_NHW3: np.ndarray, original_NHW3: np.ndarray) -> dict[str, np.ndarray]:
    """{"ssim": values_N}: structural similarity (Wang et al. 2004) on RGB in [0, 1] with the Gaussian window of 11
    pixels; nothing for pictures into which it does not fit. Raises MissingExtraError."""
    if find_spec("torchmetrics") is None:
        raise MissingExtraError("eval", "torchmetrics", "SSIM")
    if min(pixels_NHW3.shape[1:3]) < SSIM_WINDOW:
        return {}
    from torchmetrics.functional.image import structural_similarity_index_measure

    values_N = structural_similarity_index_measure(unit_range(pixels_NHW3), unit_range(original_NHW3), data_range=1.0,
                                                   reduction="none")
    return {"ssim": np.asarray(values_N, np.float64).reshape(-1)}


def usage(counts_V: np.ndarray) -> float:
    """The share of the codebook's entries that occur; `counts_V` says how often each does."""
    return float((counts_V > 0).mean())


def perplexity(counts_V: np.ndarray) -> float:
    """exp of the entropy of the codes' frequencies: how many equally frequent codes would be as varied."""
    shares = counts_V[counts_V > 0] / counts_V.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
