"""What pictures are measured against, and that it is the right thing.

Generated samples are measured against statistics of the *training* set, as in ADM's VIRTUAL_imagenet256_labeled.npz:
moments `mu`, `sigma` and `mu_s`, `sigma_s` (spatial), and 10,000 pictures `arr_0` for precision and recall alone.
Reconstructions are measured against the very pictures that were reconstructed. Taking one for the other gave rFID 4.28
instead of 2.19 (LlamaGen#34) and FID 3.68 instead of 2.62 (LlamaGen#53); both mistakes are refused here.
"""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from arimg.errors import InputError
from arimg.evals.adm_npz import open_npz
from arimg.evals.extractors import BATCH, AdmInception, Extractor
from arimg.evals.frechet import Gaussian, Moments
from arimg.evals.picture_sets import Bar, Law, PictureSet, check_alike, load_npz, load_pictures, picture_files
from arimg.images import load_image, replacing

VIRTUAL = "VIRTUAL_imagenet256_labeled.npz"
REFERENCE_PICTURES = 10_000
_MOMENTS = frozenset({"mu", "sigma"})


def holds_moments(path: Path) -> bool:
    """Whether the file holds moments, and not the features of pictures. Raises InputError on a damaged one."""
    if path.suffix != ".npz" and path.exists():
        return False
    names = open_npz(path).names
    return _MOMENTS <= names and "features" not in names


def check_generation_reference(path: Path) -> None:
    """Raises InputError on a missing file and on the reference of reconstructions: a folder, pictures alone, or the
    features of pictures."""
    if path.is_dir() or not holds_moments(path):
        raise InputError(f"{path}: holds pictures, the reference of reconstructions (rFID); generated samples are "
                         f"measured against statistics of the training set: give {VIRTUAL}, or a file of "
                         "arimg eval reference")


def check_fits(path: Path, extractor: Extractor, size: tuple[int, int]) -> None:
    """Raises InputError when samples of this size, seen by this extractor, do not compare with the statistics: known
    before the first is painted."""
    law = read_moments(path)
    check_alike(replace(law, extractor=extractor.name, size=size, source="samples"), law)


def generation_reference(path: Path, extractor: Extractor, bar: Bar = iter) -> Law:
    """The statistics of a training set. Raises InputError, also on the reference of reconstructions."""
    check_generation_reference(path)
    return load_moments(path, extractor, bar)


def reconstruction_reference(path: Path, extractor: Extractor, bar: Bar = iter) -> PictureSet:
    """The pictures that were reconstructed, or their features. Raises InputError on statistics of a training set."""
    if holds_moments(path):
        raise InputError(f"{path}: holds statistics of a training set, the reference of generated samples (FID); "
                         "reconstructions are measured against the pictures that were reconstructed (rFID): give "
                         "these, or leave --reference out")
    return load_pictures(path, extractor, bar)


def load_moments(path: Path, extractor: Extractor, bar: Bar = iter) -> Law:
    """`read_moments`, and the features of the pictures `arr_0`, if the moments are of the same extractor's."""
    file, law = open_npz(path), read_moments(path)
    if law.extractor != extractor.name or file.shape is None:
        return law
    return replace(law, pool_MC=load_npz(file, extractor, bar).features.pool_NC)


def read_moments(path: Path) -> Law:
    """`mu` and `sigma`, and as far as they are there `mu_s` and `sigma_s`, without pictures.

    A file that names no extractor is taken to be made with Inception. Raises InputError.
    """
    file = open_npz(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            made_with = str(arrays["extractor"]) if "extractor" in arrays else AdmInception.name
            pool = _gaussian(path, arrays["mu"], arrays["sigma"])
            spatial = _gaussian(path, arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as statistics ({error}); fetch or write it again") from None
    size = None if file.shape is None else (file.shape[1], file.shape[2])
    return Law(pool, spatial, None, made_with, str(path), size)


def _gaussian(path: Path, mean_C: np.ndarray, covariance_CC: np.ndarray) -> Gaussian:
    if mean_C.ndim != 1 or covariance_CC.shape != (len(mean_C), len(mean_C)):
        raise InputError(f"{path}: moments of shapes {mean_C.shape} and {covariance_CC.shape} do not fit; "
                         "fetch or write it again")
    mean_C, covariance_CC = mean_C.astype(np.float64), covariance_CC.astype(np.float64)
    if not (np.isfinite(mean_C).all() and np.isfinite(covariance_CC).all()):
        raise InputError(f"{path}: holds moments that are not finite numbers; fetch or write it again")
    return Gaussian.of(mean_C, covariance_CC)


def read_pixels(path: Path, count: int) -> np.ndarray:
    """pixels_MHW3 of at most REFERENCE_PICTURES of the `count` pictures of a folder or an .npz, evenly spread."""
    kept = np.unique(np.linspace(0, count - 1, min(count, REFERENCE_PICTURES)).round().astype(int))
    if path.suffix != ".npz":
        files = picture_files(path)
        return np.stack([np.asarray(load_image(files[k], "picture")) for k in kept])
    file = open_npz(path)
    if file.shape is None:
        raise InputError(f"{path}: holds features without their pictures, which precision and recall need; give the "
                         "pictures themselves")
    pixels, first = [], 0
    for batch in file.batches(BATCH):
        pixels.append(batch[kept[(kept >= first) & (kept < first + len(batch))] - first])
        first += len(batch)
    return np.concatenate(pixels)


def write_reference(path: Path, pictures: PictureSet, pixels_MHW3: np.ndarray) -> None:
    """A file in ADM's layout: the moments of `pictures`, and `pixels_MHW3` of some of them for precision and recall.

    Raises InputError.
    """
    arrays: dict[str, Any] = {"arr_0": pixels_MHW3, "extractor": pictures.extractor, "n": len(pictures),
                              "source": pictures.source}
    for suffix, column in (("", pictures.features.pool_NC), ("_s", pictures.features.spatial_NS)):
        if column is not None:
            moments = Moments.of(column)
            arrays |= {f"mu{suffix}": moments.mean_C, f"sigma{suffix}": moments.covariance_CC}
    with replacing(path) as stream:
        np.savez(stream, **arrays)
