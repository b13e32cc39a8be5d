"""From pictures to feature vectors, and what the figures made with them are called."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from arimg.data import to_images
from arimg.errors import InputError
from arimg.features import INCEPTION_SHA256, EffnetLite0, Inception, effnet_lite0_file, inception_file
from arimg.registry import EXTRACTORS

BATCH = 32
_OTHER_NAMES = {"fid": "fd", "rfid": "fd", "sfid": "sfd", "inception_score": "is"}

log = logging.getLogger("arimg")


class Features(NamedTuple):
    """Of N pictures, float32; arrays or memory maps."""

    pool_NC: np.ndarray                         # for Frechet distance, KID, precision and recall
    spatial_NS: np.ndarray | None = None        # for the spatial Frechet distance, sFID
    logits_NK: np.ndarray | None = None         # for the Inception score

    def first(self, count: int) -> Features:
        """Those of the first `count` pictures."""
        return Features(self.pool_NC[:count], *(None if column is None else column[:count] for column in self[1:]))


class Extractor(Protocol):
    """From uint8 pictures to features. `name` stands in the names of all figures made with it."""

    name: str

    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        """Features of a batch."""

    def describe(self) -> dict[str, str]:
        """What a report says about it."""


class AdmInception:
    """Inception as ADM's evaluator uses it (Dhariwal and Nichol 2021): the one extractor whose distance is called FID.

    weights: a file, or "download"; see `arimg.features.inception_file`, also for what is raised.
    """

    name = "inception"

    def __init__(self, device: str | torch.device = "cpu", weights: str | None = None) -> None:
        path = inception_file(weights)
        self._digest = sha256_of(path)
        self._device = device
        self._network = Inception(path).to(device)
        if not self.published:
            log.warning("%s: not the published Inception weights (SHA-256 %s..., not %s...); figures made with them "
                        "compare only with one another", path, self._digest[:8], INCEPTION_SHA256)

    @property
    def published(self) -> bool:
        """Whether the weights are those that published figures are made with."""
        return self._digest.startswith(INCEPTION_SHA256)

    @torch.no_grad()
    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        pixels_B3HW = torch.from_numpy(np.ascontiguousarray(pixels_BHW3)).permute(0, 3, 1, 2).to(self._device)
        return Features(*(column.cpu().numpy() for column in self._network(pixels_B3HW)))

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "layer": "pool_3 (2048); mixed_6/conv, 7 channels, channels last (2023); logits "
                "without bias (1008)", "weights_sha256": self._digest}


class EffnetLite0Pooled:
    """EfficientNet-Lite0, trained on ImageNet: its sixth stage, averaged over the picture; 192 channels.

    They are divided by 5, their root mean square on the emoji set, so that the three terms of KID's kernel all count.
    Distances in these features are no FID: they compare with one another only. Raises MissingExtraError.
    """

    name = "effnet_lite0"
    scale = 5.0
    layer = f"stage 6 of 7, mean over pixels, 192 channels, divided by {scale:g}"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = device
        self.network = EffnetLite0().to(device)

    @torch.no_grad()
    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        pooled_BC = self.network.pooled(to_images(pixels_BHW3).to(self._device)) / self.scale
        return Features(pooled_BC.cpu().numpy())

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "layer": self.layer, "weights_sha256": sha256_of(effnet_lite0_file())}


class EffnetLite0Stages(EffnetLite0Pooled):
    """The same network's first five stages, each averaged over the picture; 272 channels. Outlines and shading, by
    which drawing styles differ, are seen early: a linear probe tells 94 % of held-out emoji right here, 86 % in the
    sixth stage alone."""

    name = "effnet_lite0_stages"
    layer = "stages 1 to 5 of 7, means over pixels, 272 channels"

    @torch.no_grad()
    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        maps = self.network(to_images(pixels_BHW3).to(self._device))
        return Features(torch.cat([features_BChw.mean((2, 3)) for features_BChw in maps], 1).cpu().numpy())


def find_extractor(name: str, device: str | torch.device = "cpu", inception: str | None = None) -> Extractor:
    """The extractor called `name`; `inception` says where its weights lie. Raises UnknownNameError, MissingExtraError,
    CheckpointError, and InputError on `inception` beside another extractor."""
    if name == AdmInception.name:
        return AdmInception(device, inception)
    if inception is not None:
        raise InputError(f"--inception {inception} beside --extractor {name}: leave one of them out")
    extractor: Extractor = EXTRACTORS.load(name)(device)
    return extractor


def metric_name(metric: str, extractor: str) -> str:
    """FID, rFID, sFID, IS, precision, recall and KID bear these names when Inception saw the pictures; figures of any
    other extractor carry its name."""
    if extractor == AdmInception.name:
        return metric
    return f"{_OTHER_NAMES.get(metric, metric)}_{extractor}"


def extract(batches: Iterable[np.ndarray], extractor: Extractor) -> Features:
    """Features of all pictures that come in batches of uint8 (B, H, W, 3)."""
    pool, spatial, logits = zip(*(extractor(pixels_BHW3) for pixels_BHW3 in batches))
    return Features(np.concatenate(pool), *(None if columns[0] is None else np.concatenate(columns)
                                            for columns in (spatial, logits)))


def in_batches(pixels_NHW3: np.ndarray, bar: Callable[[Iterable], Iterable] = iter) -> Iterator[np.ndarray]:
    """Pictures in batches for an extractor; `bar` wraps the iteration."""
    for start in bar(range(0, len(pixels_NHW3), BATCH)):
        yield pixels_NHW3[start:start + BATCH]


def sha256_of(path: Path) -> str:
    """Of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
