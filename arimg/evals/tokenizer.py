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
from arimg.evals.held_out import HeldOut, files_below, fingerprint_of
from arimg.evals.picture_sets import Bar, PictureSet, distances
from arimg.evals.report import Report, versions
from arimg.evals.tokenizer_metrics import BATCH, masked_psnr, perplexity, psnr, ssim, usage
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

    codes_V: np.ndarray
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, values: dict[str, np.ndarray]) -> None:
        for name, values_B in values.items():
            self.values.setdefault(name, []).append(values_B)

    def add_pool(self, name: str, features: Features) -> None:
        self.features.setdefault(name, []).append(features.pool_NC)

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
    """PSNR, SSIM, LPIPS if its network is there, codebook usage, edges, and distances to the reference.

    Raises InputError on a reference that was not made alike.
    """
    tally = _Tally(np.zeros(tokenizer.vocab_size, np.int64))
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
    report.add("reconstructions", {"codes": float(tokenizer.vocab_size), "usage": usage(tally.codes_V),
                                   "perplexity": perplexity(tally.codes_V)})
    report.add("reconstructions", distances(rebuilt, reference, seed, "rfid"))
    return report


def _measure(tokenizer: Any, read: np.ndarray, compared: np.ndarray, judges: Judges, tally: _Tally) -> None:
    device = next(tokenizer.parameters()).device
    encoded = tokenizer.encode(to_images(read).to(device))
    images_B3HW = resized(tokenizer.decode_codes(encoded.codes_BL, encoded.grid), compared.shape[1:3])
    pixels = to_pixels(images_B3HW)
    tally.codes_V += np.bincount(encoded.codes_BL.flatten().cpu().numpy(), minlength=len(tally.codes_V))
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
