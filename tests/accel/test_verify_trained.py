"""A trained student's guesses, verified: the teacher's own codes for the same noise in a fraction of the passes, under
control. `-s` prints the table of docs/distilled.md."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder
from arimg.accel.dd1 import Dd1
from arimg.accel.jacobi import Jacobi
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR, Verify
from tests.accel.toy_trained import LENGTH, SOLVER, single, trained_student, trained_teacher

pytestmark = pytest.mark.slow
PICTURES = 8


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """Per decoder: codes, mean passes, processor seconds per picture, share of right guesses."""
    teacher = trained_teacher(150)
    student = trained_student(teacher, 4096, 500)
    asked = teacher.request(PICTURES, 10, torch.Generator().manual_seed(5))
    decoders: dict[str, Decoder] = {
        "ar": PlainAR(), "jacobi": Jacobi(), "the flow, one by one": FlowAR(SOLVER), "dd1": Dd1(student),
        "the flow, jacobi's guesses": Verify(solver=SOLVER), "dd1 verified": Verify(Dd1(student), solver=SOLVER)}
    rows = {}
    for name, decoder in decoders.items():
        began, results = time.process_time(), []
        for k in range(PICTURES):
            one = single(asked, k)
            results.append(decoder.decode(Target(teacher.transformer, one), one))
        rows[name] = {"codes": torch.cat([result.codes_BL for result in results if result.codes_BL is not None]),
                      "passes": sum(result.stats.forward_passes for result in results) / PICTURES,
                      "seconds": (time.process_time() - began) / PICTURES,
                      "agreement": sum(result.stats.extra.get("draft_agreement", 0) for result in results) / PICTURES}
        print(f"| {name} | {rows[name]['passes']:.1f} | {rows[name]['seconds']:.3f} |")
    return rows


def test_codes_are_the_teachers_own(rows: dict[str, dict[str, Any]]) -> None:
    own = rows["the flow, one by one"]["codes"]
    assert torch.equal(rows["dd1 verified"]["codes"], own)
    assert torch.equal(rows["the flow, jacobi's guesses"]["codes"], own)
    assert not torch.equal(rows["dd1"]["codes"], own) and not torch.equal(rows["ar"]["codes"], own)
    assert 0.4 < rows["dd1 verified"]["agreement"] < 1, "a student that was trained, and is not the teacher"


def test_passes_are_at_most_half_of_plain_decodings(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["ar"]["passes"] == LENGTH and rows["dd1"]["passes"] == 1
    assert rows["dd1 verified"]["passes"] <= LENGTH / 2
    assert rows["dd1 verified"]["seconds"] < rows["the flow, one by one"]["seconds"]
