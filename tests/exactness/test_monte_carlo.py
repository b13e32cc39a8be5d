"""With the real noise: as many decodes as a G-test needs, all in a few batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arimg.accel.jacobi import Jacobi, Scd, ScdGumbel, Sjd, SpeculativeJacobi
from arimg.accel.siblings import ScdSiblings
from arimg.accel.target import Target
from arimg.noise import CounterNoise
from tests.exactness.mutants import StaleLaw
from tests.exactness.tiny import Case

CASE = Case(4, (1, 5))
CELLS = CASE.vocab ** CASE.length
BATCH, BATCHES = 50_000, 6
DECODERS: dict[str, Callable[[], SpeculativeJacobi]] = {
    "jacobi": lambda: Jacobi(3), "sjd": lambda: Sjd(3, "uniform-law"), "scd": lambda: Scd(3),
    "scd-gumbel": lambda: ScdGumbel(3), "scd-siblings": lambda: ScdSiblings(3)}


@torch.no_grad()
def counts(decoder: SpeculativeJacobi) -> Tensor:
    """How often each sequence of codes came up."""
    found = torch.zeros(CELLS, dtype=torch.int64)
    for number in range(BATCHES):
        request = CASE.request(torch.zeros(BATCH, dtype=torch.int64), CounterNoise())
        request = type(request)(**{**vars(request), "seeds_B": request.seeds_B + number * BATCH})
        codes_BL = decoder.decode(Target(CASE.net, request), request).codes_BL
        assert codes_BL is not None
        found += torch.bincount((codes_BL * CASE.vocab ** torch.arange(CASE.length - 1, -1, -1)).sum(1),
                                minlength=CELLS)
    return found


def deviation(observed_C: Tensor, law_C: Tensor) -> float:
    """The G statistic, 2 sum n log(n / expected), as standard normal deviate (Wilson and Hilferty 1931); cells that
    expect fewer than 10 are pooled."""
    expected_C = law_C * observed_C.sum()
    rare_C = expected_C < 10
    group_C = torch.where(rare_C, 0, (~rare_C).cumsum(0))
    observed, expected = (torch.bincount(group_C, values_C.double()) for values_C in (observed_C, expected_C))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = 2 * float(torch.special.xlogy(observed, observed / expected).sum())
    spread = 2 / (9 * (len(observed) - 1))
    return ((statistic / (len(observed) - 1)) ** (1 / 3) - (1 - spread)) / spread ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_frequencies(name: str) -> None:
    """All codes, each position by itself, and each pair of positions."""
    observed = counts(DECODERS[name]())
    assert abs(deviation(observed, CASE.chain_law)) < 3.9           # two-sided 1e-4
    shape = (CASE.vocab,) * CASE.length
    for first in range(CASE.length):
        for second in range(first, CASE.length):
            others = [axis for axis in range(CASE.length) if axis not in (first, second)]
            assert deviation(observed.reshape(shape).sum(others).flatten(),
                             CASE.chain_law.reshape(shape).sum(others).flatten()) < 3.9


@pytest.mark.slow
def test_frequencies_show_a_bias() -> None:
    assert deviation(counts(StaleLaw(3)), CASE.chain_law) > 10
