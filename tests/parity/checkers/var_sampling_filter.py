"""VAR's sampler: top-k, then top-p from the least likely code up. A name such as k6_p0p9 says top-k 6, top-p 0.9; a
top-p of 0 is off."""

from __future__ import annotations

import re

from arimg.accel.base import Sampling
from arimg.accel.target import filter_probs
from tests.parity.fixture import Fixture

NAME = re.compile(r"out\.k(\d+)_p([0-9p]+)\.probs")


def check(fixture: Fixture) -> None:
    """Compare the probabilities of every output."""
    for name in fixture.outputs():
        match = NAME.fullmatch(name)
        assert match is not None, name
        sampling = Sampling(top_k=int(match[1]), top_p=number(match[2]) or 1.0)
        fixture.compare(name, filter_probs(fixture["in.logits"], sampling, from_below=True))


def number(text: str) -> float:
    """0p95 -> 0.95"""
    return float(text.replace("p", "."))
