"""The linear probe on features that tell, and on features that do not."""

from __future__ import annotations

import numpy as np
import pytest

from arimg.errors import InputError
from arimg.evals.probe import fit_probe


def clouds(count: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes about three corners, on scales that differ by a million."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    corners = np.array([[0, 0], [1, 0], [0, 1]])
    return ((corners[labels] + spread * rng.normal(size=(count, 2))) * [1e3, 1e-3]).astype(np.float32), labels


def test_separable_classes_are_told() -> None:
    probe = fit_probe(*clouds(90, 0.1, 0))
    features, labels = clouds(300, 0.1, 1)
    assert (probe.predict(features) == labels).mean() > 0.99


def test_features_without_information_are_worth_nothing() -> None:
    features, labels = clouds(3000, 0.1, 0)
    shuffled = np.random.default_rng(2).permutation(labels)
    probe = fit_probe(features, shuffled)
    assert (probe.predict(features) == shuffled).mean() < 0.4


def test_the_same_in_every_run_and_constant_features_do_no_harm() -> None:
    features, labels = clouds(60, 0.3, 0)
    features = np.concatenate([features, np.ones((60, 1), np.float32)], axis=1)
    probes = [fit_probe(features, labels) for _ in range(2)]
    assert probes[0].weight_CK.equal(probes[1].weight_CK)
    assert (probes[0].predict(features) == labels).mean() > 0.7


def test_one_class_is_no_question() -> None:
    with pytest.raises(InputError, match="at least 2 classes"):
        fit_probe(np.zeros((4, 2), np.float32), np.zeros(4, np.int64))
