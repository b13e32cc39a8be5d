"""Acceptance C1 on the embedded model in float32."""

from __future__ import annotations

import pytest

from arimg import Pipeline
from tests.exactness.divergence import WINDOWS, divergences

SEEDS, TIE, RATE = 16, 1e-3, 1 / 200


@pytest.mark.slow
def test_every_first_difference_is_a_tie_and_there_is_hardly_any() -> None:
    found = divergences(Pipeline.from_pretrained("emoji", device="cpu", dtype="float32"), SEEDS)
    assert all(one.gap < TIE for one in found), found
    assert len(found) <= RATE * SEEDS * 2 * len(WINDOWS), found
