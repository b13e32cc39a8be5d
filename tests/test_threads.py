"""How many threads a decode takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from arimg.quantize import quantize
from arimg.threads import cpu_threads, decode_threads
from tests.models.toy import toy_model


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_small_models_take_one_thread_for_narrow_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = toy_model()
    assert decode_threads(small, 2) == 1 and decode_threads(small, 10 ** 9) is None
    assert decode_threads(quantize(toy_model(), "int8"), 2) == 1, "packed weights count"
    assert decode_threads(nn.Linear(2, 2), 2) is None
    large = nn.ParameterList([torch.empty(2 * 10 ** 7)])
    large.config = SimpleNamespace(layers=12)       # type: ignore[assignment]
    assert decode_threads(large, 2) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert decode_threads(small, 2) is None


def test_threads_are_as_before_after_the_block() -> None:
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(ValueError), cpu_threads(1):
        raise ValueError
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before
