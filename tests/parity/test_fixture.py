from __future__ import annotations

import pytest
import torch

from tests.parity.fixture import Fixture
from tests.parity.test_parity import family


def fixture(**rule: object) -> Fixture:
    tensors = {"out.a": torch.tensor([1.0, 2.0]), "out.mask": torch.tensor([True, False]), "out.b": torch.zeros(1)}
    return Fixture("toy", {"compare": {"out.a": rule, "out.b": {"mode": "informative"}}}, tensors)


def test_exact() -> None:
    fixture(mode="exact").compare("out.a", torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="1 of 2 values differ"):
        fixture(mode="exact").compare("out.a", torch.tensor([1.0, 2.0001]))


def test_where() -> None:
    fixture(mode="exact", where="out.mask").compare("out.a", torch.tensor([1.0, 9.0]))
    with pytest.raises(AssertionError, match="1 of 2 values differ"):
        fixture(mode="exact", where="out.mask").compare("out.a", torch.tensor([9.0, 2.0]))


def test_close() -> None:
    fixture(mode="close", rtol=0.1, atol=0.0).compare("out.a", torch.tensor([1.05, 2.15]))
    for wrong in ([1.2, 2.0], [float("nan"), 2.0]):
        with pytest.raises(AssertionError, match="values differ"):
            fixture(mode="close", rtol=0.1, atol=0.0).compare("out.a", torch.tensor(wrong))


def test_precision_and_shape() -> None:
    rule = {"mode": "close", "rtol": 0.0, "atol": 1.0, "dtype": "float64"}
    fixture(**rule).compare("out.a", torch.zeros(2, dtype=torch.float64) + 1)
    with pytest.raises(AssertionError, match="computed in torch.float32"):
        fixture(**rule).compare("out.a", torch.ones(2))
    with pytest.raises(AssertionError, match=r"shape \(1,\)"):
        fixture(mode="exact").compare("out.a", torch.ones(1))


def test_every_output_must_be_compared() -> None:
    toy = fixture(mode="exact")
    with pytest.raises(AssertionError, match="never compared: out.a"):
        toy.assert_complete()
    toy.compare("out.a", torch.tensor([1, 2]))
    toy.assert_complete()


def test_families() -> None:
    assert family("llamagen_gpt_c2i_wide") == "llamagen_gpt"
    assert family("controlar_t2i") == "controlar"
    assert family("mar_head_toy") == "mar_head" and family("mar_head_sampling_toy") == "mar_head_sampling"
    assert family("llamagen_other") is None
