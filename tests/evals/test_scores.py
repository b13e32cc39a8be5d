"""FID, IS, precision and recall against torch-fidelity on the same pictures and extractor, against a plain float64
reference, and on points drawn by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from arimg.errors import InputError
from arimg.evals import scores
from arimg.evals.picture_sets import PictureSet, figures
from arimg.evals.scores import SCORE_BLOCK, inception_score, precision_recall, squared_radii, within
from tests.evals.fake import FakeInception

SIDE = 16


def pictures(count: int, seed: int) -> np.ndarray:
    """Blobs of a few kinds, so that neither set covers the other."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3)) * rng.uniform(0.3 + 0.1 * seed, 1, (count, 1, 1, 1))
    return coarse.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2).astype(np.uint8)


SAMPLES, REFERENCE = pictures(120, 0), pictures(90, 1)


def ours(seed: int = 0) -> dict[str, float]:
    extractor = FakeInception()
    sets = [PictureSet(extractor(pixels), "inception", (SIDE, SIDE), "") for pixels in (SAMPLES, REFERENCE)]
    return {name: found.value for name, found in figures(sets[0], sets[1].law(), seed, rounds=2).items()}


# ---------------------------------------------------------------------------------------------------------------------
# torch-fidelity


@pytest.fixture(scope="module")
def theirs() -> dict[str, float]:
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Toy(FeatureExtractorBase):
        """The same features, as torch-fidelity wants them."""

        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pool"

        def forward(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = FakeInception()(pixels_B3HW.movedim(1, -1).numpy())
            named = {"pool": torch.from_numpy(found.pool_NC), "logits": torch.from_numpy(found.logits_NK)}
            return tuple(named[name] for name in self.features_list)

    class Pictures(Dataset):
        def __init__(self, pixels: np.ndarray) -> None:
            self.pixels = torch.from_numpy(pixels).movedim(-1, 1)

        def __len__(self) -> int:
            return len(self.pixels)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.pixels[index]

    fidelity.register_feature_extractor("toy-of-arimg", Toy)
    return fidelity.calculate_metrics(
        input1=Pictures(SAMPLES), input2=Pictures(REFERENCE), feature_extractor="toy-of-arimg", fid=True, isc=True,
        prc=True, isc_splits=1, cuda=False, cache=False, verbose=False, batch_size=30,
        save_cpu_ram=True)


@pytest.mark.parametrize(("metric", "name"), [
    ("fid", "frechet_inception_distance"), ("inception_score", "inception_score_mean"),
    ("precision", "precision"), ("recall", "recall")])
def test_equals_torch_fidelity(theirs: dict[str, float], metric: str, name: str) -> None:
    assert ours()[metric] == pytest.approx(theirs[name], rel=1e-3)
    assert theirs[name] > 0.05, "a figure that tells something"


def test_blocks_of_the_score_are_torch_fidelity_splits() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = np.random.default_rng(0).normal(size=(2 * SCORE_BLOCK, 7)).astype(np.float32)
    shuffled = logits[np.random.default_rng(0).permutation(len(logits))]
    found = isc_features_to_metric(torch.from_numpy(shuffled), splits=2, shuffle=False)
    assert inception_score(logits).value == pytest.approx(found["inception_score_mean"], rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# The definitions, in plain float64


def plain(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """FID, sFID, IS, precision and recall, written from the papers."""
    found = [[np.asarray(column, np.float64) for column in FakeInception()(pixels)] for pixels in (samples, reference)]

    def frechet(a: np.ndarray, b: np.ndarray) -> float:
        covariances = [np.cov(x, rowvar=False) for x in (a, b)]
        roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(distances(centres, centres), axis=1)[:, 3]
        return (distances(points, centres) <= radii).any(1).mean()

    pools, spatials, logits = ([one[column] for one in found] for column in range(3))
    p = np.exp(logits[0]) / np.exp(logits[0]).sum(1, keepdims=True)
    return {"fid": frechet(*pools), "sfid": frechet(*spatials),
            "inception_score": np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()),
            "precision": covered(pools[0], pools[1]), "recall": covered(pools[1], pools[0])}


def test_equals_the_plain_reference() -> None:
    assert ours() == pytest.approx(plain(SAMPLES, REFERENCE), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Inception score


def test_score_of_certain_and_of_ignorant_classifiers() -> None:
    certain = np.eye(6, dtype=np.float32).repeat(20, 0) * 100
    assert inception_score(certain).value == pytest.approx(6, rel=1e-6)
    assert inception_score(np.zeros((30, 6), np.float32)).value == pytest.approx(1)


def test_score_of_a_class_sorted_set_does_not_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consecutive blocks of it would each hold a single class, and score 1."""
    monkeypatch.setattr(scores, "SCORE_BLOCK", 60)
    certain = np.eye(6, dtype=np.float32).repeat(60, 0) * 100
    shuffled = certain[np.random.default_rng(1).permutation(360)]
    assert inception_score(certain).value == pytest.approx(inception_score(shuffled).value, rel=0.02)
    assert inception_score(certain).value > 5.5


def test_score_has_an_interval() -> None:
    logits = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32) * 2
    found = inception_score(logits)
    assert found == inception_score(logits) and found.low < found.value < found.high


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall


def line(*places: float) -> np.ndarray:
    return np.array(places, np.float32)[:, None]


def test_radii_are_those_of_the_third_neighbour() -> None:
    assert np.sqrt(squared_radii(line(0, 1, 3, 7, 20))).tolist() == [7, 6, 4, 7, 19]


def test_balls_hold_their_surface() -> None:
    centres, radii = line(0, 100), np.array([4.0, 0.0])
    assert within(line(2, -2, 2.5, 100, 99), centres, radii).tolist() == [True, True, False, True, False]


def test_precision_and_recall_of_points_drawn_by_hand() -> None:
    """Samples sit in one of two clusters of the reference: all are precise, and one half is recalled."""
    reference, samples = line(0, 1, 2, 3, 100, 101, 102, 103), line(0.5, 1.5, 2.5, 3.5)
    found = precision_recall(samples, reference)
    assert (found.precision.value, found.recall.value) == (1, 0.5)
    swapped = precision_recall(reference, samples)
    assert (swapped.precision.value, swapped.recall.value) == (0.5, 1)
    far = precision_recall(samples + 1000, reference)
    assert (far.precision.value, far.recall.value) == (0, 0)


def test_blocks_do_not_change_precision_and_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 3)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32)
    whole = precision_recall(a, b)
    monkeypatch.setattr(scores, "ROWS", 7)
    assert precision_recall(a, b) == whole and 0 < whole.precision.value < 1


def test_too_few_pictures() -> None:
    with pytest.raises(InputError, match="samples has 3 pictures, and each needs 3 others"):
        precision_recall(line(1, 2, 3), line(1, 2, 3, 4))


def test_memory_maps_serve(tmp_path: Path) -> None:
    columns = FakeInception()(SAMPLES)
    maps = []
    for index, column in enumerate(columns):
        np.save(tmp_path / f"{index}.npy", column)
        maps.append(np.load(tmp_path / f"{index}.npy", mmap_mode="r"))
    law = PictureSet(FakeInception()(REFERENCE), "toy", (SIDE, SIDE), "").law()
    direct, mapped = (figures(PictureSet(type(columns)(*found), "toy", (SIDE, SIDE), ""), law, rounds=2)
                      for found in (columns, maps))
    assert direct == mapped and set(direct) == {"fd_toy", "sfd_toy", "is_toy", "precision_toy", "recall_toy"}
