"""Sets of pictures and their features: extracted, kept in statistics files, compared only with what was made alike."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arimg import images
from arimg.errors import InputError
from arimg.evals.adm_npz import Npz, open_npz
from arimg.evals.bootstrap import Figure
from arimg.evals.extractors import BATCH, Extractor, Features, extract, in_batches, metric_name, sha256_of
from arimg.evals.frechet import FRECHET_ROUNDS, Gaussian, Moments, frechet_figure, kid_figure
from arimg.evals.scores import inception_score, precision_recall

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Bar = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class PictureSet:
    """The features of some pictures and what they were made from."""

    features: Features
    extractor: str
    size: tuple[int, int]           # (height, width) in pixels
    source: str

    def __len__(self) -> int:
        return len(self.features.pool_NC)

    def law(self) -> Law:
        """Its moments, with the pictures themselves for precision and recall."""
        spatial_NS = self.features.spatial_NS
        return Law(_gaussian(self.features.pool_NC), None if spatial_NS is None else _gaussian(spatial_NS),
                   self.features.pool_NC, self.extractor, self.source, self.size)

    def save(self, path: Path) -> None:
        """Write a statistics file (.npz): features, their moments, n, and how they were made. Raises InputError."""
        moments = Moments.of(self.features.pool_NC)
        arrays: dict[str, Any] = {
            "features": self.features.pool_NC, "spatial": self.features.spatial_NS, "logits": self.features.logits_NK,
            "mu": moments.mean_C, "sigma": moments.covariance_CC, "n": len(self), "extractor": self.extractor,
            "size": self.size, "source": self.source}
        with images.replacing(path) as stream:
            np.savez(stream, **{name: array for name, array in arrays.items() if array is not None})


@dataclass(frozen=True)
class Law:
    """What a set of pictures is measured against: normal laws of features, and pictures for precision and recall."""

    pool: Gaussian
    spatial: Gaussian | None
    pool_MC: np.ndarray | None
    extractor: str
    source: str
    size: tuple[int, int] | None    # None = not known


def _gaussian(features_NC: np.ndarray) -> Gaussian:
    moments = Moments.of(features_NC)
    return Gaussian.of(moments.mean_C, moments.covariance_CC)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def distances(pictures: PictureSet, reference: PictureSet, seed: int = 0, frechet: str = "fid") -> dict[str, Figure]:
    """Frechet distance ("fid", or "rfid" of reconstructions) and KID of a set to a reference.

    Raises InputError on sets that were not made alike.
    """
    check_alike(pictures, reference)
    check_enough(pictures, reference)
    pool_NC, pool_MC = pictures.features.pool_NC, reference.features.pool_NC
    return {metric_name(frechet, pictures.extractor): frechet_figure(pool_NC, _gaussian(pool_MC), seed),
            metric_name("kid", pictures.extractor): kid_figure(pool_NC, pool_MC, seed)}


def figures(pictures: PictureSet, law: Law, seed: int = 0, rounds: int = FRECHET_ROUNDS,
            device: str = "cpu") -> dict[str, Figure]:
    """FID, sFID, IS, precision and recall, as far as the extractor and the reference know what they need.

    `rounds` of the bootstrap for each Frechet distance. Raises InputError on what was not made alike.
    """
    check_alike(pictures, law)
    check_enough(pictures)
    if pictures.features.pool_NC.shape[1] != len(law.pool.mean_C):
        raise InputError(f"{law.source} holds moments of {len(law.pool.mean_C)} features, and the extractor "
                         f"{pictures.extractor} gives {pictures.features.pool_NC.shape[1]}; make both alike")
    columns = pictures.features
    found = {"fid": frechet_figure(columns.pool_NC, law.pool, seed, rounds)}
    if columns.spatial_NS is not None and law.spatial is not None:
        found["sfid"] = frechet_figure(columns.spatial_NS, law.spatial, seed, rounds)
    if columns.logits_NK is not None:
        found["inception_score"] = inception_score(columns.logits_NK, seed)
    if law.pool_MC is not None:
        found.update(precision_recall(columns.pool_NC, law.pool_MC, seed, device)._asdict())
    return {metric_name(name, pictures.extractor): value for name, value in found.items()}


def check_alike(pictures: PictureSet | Law, reference: PictureSet | Law) -> None:
    """Raises InputError when extractors or sizes differ."""
    for what, ours, theirs in (("features", pictures.extractor, reference.extractor),
                               ("sizes", pictures.size, reference.size)):
        if ours is not None and theirs is not None and ours != theirs:
            shown = [one if isinstance(one, str) else f"{one[0]}x{one[1]}" for one in (ours, theirs)]
            raise InputError(f"{pictures.source} and {reference.source} have {what} {shown[0]} and {shown[1]}, which "
                             "do not compare; make both alike")


def check_enough(*sets: PictureSet) -> None:
    """Raises InputError on a set of fewer than two pictures."""
    for one in sets:
        if len(one) < 2:
            raise InputError(f"{one.source} has {len(one)} picture; a distance between sets needs at least 2 in each")


# ---------------------------------------------------------------------------------------------------------------------
# Where sets come from


def features_of(pixels_NHW3: np.ndarray, extractor: Extractor, source: str, bar: Bar = iter) -> PictureSet:
    """Extract the features of uint8 pictures."""
    height, width = pixels_NHW3.shape[1:3]
    return PictureSet(extract(in_batches(pixels_NHW3, bar), extractor), extractor.name, (height, width), source)


def load_pictures(path: Path, extractor: Extractor, bar: Bar = iter) -> PictureSet:
    """The features of a folder of pictures of one size, of an .npz of pictures (ADM's layout), or those in a file of
    `PictureSet.save`. Raises InputError, also on a file of moments without pictures."""
    if path.suffix != ".npz":
        return _load_folder(path, extractor, bar)
    file = open_npz(path)
    if "features" in file.names:
        return _load_statistics(path)
    if file.shape is None:
        raise InputError(f"{path}: holds neither pictures (arr_0) nor their features ({', '.join(sorted(file.names))}"
                         "); as A give pictures, moments alone serve as B")
    return load_npz(file, extractor, bar)


def load_npz(file: Npz, extractor: Extractor, bar: Bar = iter) -> PictureSet:
    """The features of the pictures in an .npz. Raises InputError."""
    assert file.shape is not None
    source, size = str(file.path), (file.shape[1], file.shape[2])
    return PictureSet(extract(bar(file.batches(BATCH)), extractor), extractor.name, size, source)


def _load_statistics(path: Path) -> PictureSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            others = (file[name] if name in file else None for name in ("spatial", "logits"))
            features = Features(file["features"], *others)
            return PictureSet(features, str(file["extractor"]), tuple(file["size"].tolist()), str(path))
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a statistics file of arimg ({error}); make one with: arimg eval fid FOLDER "
                         "held-out --save FILE.npz") from None


def picture_files(folder: Path) -> list[Path]:
    """The pictures directly in a folder, by name. Raises InputError when there is none."""
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "no such folder"
        raise InputError(f"{folder}: {what}; give a folder of pictures ({', '.join(SUFFIXES)})")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no picture in it ({', '.join(SUFFIXES)}); give a folder that holds some")
    return found


def fingerprint(path: Path) -> str:
    """Of a folder of pictures, or of the file that stands for them. Raises InputError."""
    return fingerprint_of([path] if path.is_file() else picture_files(path))


def fingerprint_of(files: Sequence[Path]) -> str:
    """Equal for the same files in the same order, told by their contents."""
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:16]


def _load_folder(folder: Path, extractor: Extractor, bar: Bar) -> PictureSet:
    files = picture_files(folder)
    with images.load_image(files[0], "picture") as first:
        size = (first.height, first.width)
    return PictureSet(extract(_read(files, size, bar), extractor), extractor.name, size, str(folder))


def _read(files: list[Path], size: tuple[int, int], bar: Bar) -> Iterator[np.ndarray]:
    """Batches of the files' pixels. Raises InputError on a picture of another size."""
    for start in bar(range(0, len(files), BATCH)):
        pictures = [images.load_image(path, "picture") for path in files[start:start + BATCH]]
        for path, picture in zip(files[start:], pictures):
            if (picture.height, picture.width) != size:
                raise InputError(f"{path} has {picture.height}x{picture.width} pixels and {files[0].name} "
                                 f"{size[0]}x{size[1]}; give pictures of one size")
        yield np.stack([np.asarray(picture) for picture in pictures])
