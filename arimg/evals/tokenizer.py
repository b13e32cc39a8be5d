"""What a tokenizer makes of pictures, measured batch by batch: held-out pictures of a data set, or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from arimg import images
from arimg.data import to_images, to_pixels
from arimg.evals.bootstrap import mean_figure
from arimg.evals.control_metrics import canny_edges, edge_scores
from arimg.evals.extractors import Extractor, Features
from arimg.evals.held_out import HeldOut, files_below
from arimg.evals.picture_sets import Bar, PictureSet, distances, fingerprint_of
from arimg.evals.report import Report, versions
from arimg.evals.tokenizer_metrics import BATCH, masked_psnr, perplexity, psnr, rebuild, ssim, usage
from arimg.tokenizers.losses import PerceptualLoss


class Originals(Protocol):
    """Pictures to reconstruct."""

    def __len__(self) -> int:
        """How many."""

    def batches(self, bar: Bar) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of uint8 (B, H, W, 3): what the tokenizer reads, and what its output is compared with."""

    def describe(self) -> dict[str, Any]:
        """What a report says about them."""


@dataclass(frozen=True)
class HeldOutPictures:
    """The chosen held-out pictures of a data set."""

    data: HeldOut
    seed: int

    def __len__(self) -> int:
        return self.data.count

    def batches(self, bar: Bar) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in bar(range(0, len(self), BATCH)):
            pixels_BHW3 = self.data.chosen[start:start + BATCH]
            yield pixels_BHW3, pixels_BHW3

    def describe(self) -> dict[str, Any]:
        return {"data": self.data.fingerprint, "split": "held_out", "seed": self.seed}


@dataclass(frozen=True)
class FolderPictures:
    """The pictures below a folder, such as ImageNet's validation set, cropped as ADM does: to `size` for the tokenizer
    and to `measured` for the comparison, to which reconstructions are then resized (LlamaGen: 384 and 256)."""

    files: tuple[Path, ...]
    size: int
    measured: int

    @classmethod
    def below(cls, folder: Path, count: int | None, size: int, measured: int, seed: int = 0) -> FolderPictures:
        """`count` of them, which the seed chooses; None = all. Raises InputError."""
        return cls(tuple(files_below(folder, count, seed)), size, measured)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, bar: Bar) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in bar(range(0, len(self), BATCH)):
            loaded = [images.load_image(path, "picture") for path in self.files[start:start + BATCH]]
            read, compared = (np.stack([np.asarray(images.center_crop_adm(one, side)) for one in loaded])
                              for side in (self.size, self.measured))
            yield read, compared

    def describe(self) -> dict[str, Any]:
        return {"data": fingerprint_of(self.files), "split": "folder", "size": self.size,
                "measured_size": self.measured}


@dataclass
class _Tally:
    """What is kept of the batches: one value per picture and metric, counts of codes, features."""

    codes_V: np.ndarray                 # empty for continuous tokens
    moments_3: np.ndarray               # of those: how many numbers, their sum, the sum of their squares
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, values: dict[str, np.ndarray]) -> None:
        for name, values_B in values.items():
            self.values.setdefault(name, []).append(values_B)

    def add_pool(self, name: str, features: Features) -> None:
        self.features.setdefault(name, []).append(features.pool_NC)

    def add_tokens(self, tokens_N: np.ndarray) -> None:
        if tokens_N.dtype.kind == "f":
            numbers_N = tokens_N.astype(np.float64)
            self.moments_3 += len(numbers_N), numbers_N.sum(), np.square(numbers_N).sum()
        else:
            self.codes_V += np.bincount(tokens_N, minlength=len(self.codes_V))

    def tokens(self) -> dict[str, float]:
        """Of the tokens themselves: how the codes are used, or mean and deviation of the numbers, which the scale is
        to make 1."""
        if self.moments_3[0]:
            _, mean, square = self.moments_3 / self.moments_3[0]
            return {"latent_mean": float(mean), "latent_std": float(np.sqrt(square - mean ** 2))}
        return {"codes": float(len(self.codes_V)), "usage": usage(self.codes_V), "perplexity": perplexity(self.codes_V)}

    def pool(self, name: str) -> Features:
        return Features(np.concatenate(self.features[name]))


class Judges(NamedTuple):
    """What reconstructions are measured with besides pixels. reference None = the originals themselves."""

    extractor: Extractor
    lpips: PerceptualLoss | None = None
    reference: PictureSet | None = None


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Any, originals: Originals, judges: Judges, seed: int, bar: Bar = iter,
                       **more: Any) -> Report:
    """PSNR, SSIM, LPIPS if its network is there, codebook usage (of continuous tokens mean and deviation), edges, and
    distances to the reference.

    Raises InputError on a reference that was not made alike.
    """
    tally = _Tally(np.zeros(getattr(tokenizer, "vocab_size", 0), np.int64), np.zeros(3))
    size = (0, 0)
    for read, compared in originals.batches(bar):
        size = (compared.shape[1], compared.shape[2])
        _measure(tokenizer, read, compared, judges, tally)
    extractor = judges.extractor
    rebuilt = PictureSet(tally.pool("rebuilt"), extractor.name, size, "reconstructions")
    reference = judges.reference or PictureSet(tally.pool("originals"), extractor.name, size, "originals")
    report = Report({"evaluation": "tokenizer", "versions": versions(), "pictures": len(originals),
                     "reference_pictures": len(reference), **originals.describe(), "bootstrap_seed": seed,
                     "extractor": extractor.describe(), **more})
    report.add("reconstructions", {name: mean_figure(np.concatenate(values), seed)
                                   for name, values in tally.values.items()})
    report.add("reconstructions", tally.tokens())
    report.add("reconstructions", distances(rebuilt, reference, seed, "rfid"))
    return report


def _measure(tokenizer: Any, read: np.ndarray, compared: np.ndarray, judges: Judges, tally: _Tally) -> None:
    device = next(tokenizer.parameters()).device
    rebuilt = rebuild(tokenizer, to_images(read).to(device))
    pixels = to_pixels(resized(rebuilt.images_B3HW, compared.shape[1:3]))
    tally.add_tokens(rebuilt.tokens.flatten().cpu().numpy())
    tally.add({"psnr": psnr(pixels, compared), "psnr_mask": masked_psnr(pixels, compared), **ssim(pixels, compared)})
    if judges.lpips is not None:
        distance_B = judges.lpips(to_images(pixels).to(device), to_images(compared).to(device))
        tally.add({"lpips": distance_B.double().cpu().numpy()})
    tally.add(edge_scores(canny_edges(pixels), canny_edges(compared))._asdict())
    tally.add_pool("rebuilt", judges.extractor(pixels))
    if judges.reference is None:
        tally.add_pool("originals", judges.extractor(compared))


def resized(images_B3HW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bicubic without antialiasing on unclipped values, as LlamaGen's sampler brings 384 pixels to 256."""
    if tuple(images_B3HW.shape[2:]) == tuple(size):
        return images_B3HW
    return torch.nn.functional.interpolate(images_B3HW.float(), tuple(size), mode="bicubic")
