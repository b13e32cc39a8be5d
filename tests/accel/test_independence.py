"""Codes of an image depend on its own seed, condition and control, and on nothing else in the call or before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.target import Target
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from tests.models.toy import toy_captions, toy_classes, toy_inject, toy_model

BATCH = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": Guidance(cfg=3.0)},
    "control-guided": {"guidance": Guidance(cfg=3.0, control_cfg=2.0)},
    "control-first": {"guidance": Guidance(cfg=3.0, control_cfg=2.0, order="control-first")},
    "interval": {"guidance": Guidance(cfg=3.0, interval=(2, 9))},
    "filtered": {"guidance": Guidance(cfg=2.0), "sampling": Sampling(temperature=0.9, top_k=20, top_p=0.9)},
}


def rows_of(condition: Condition, rows: Sequence[int]) -> Condition:
    """These rows of a condition."""
    return Condition(*(None if tensor is None else tensor[list(rows)] for tensor in (
        condition.class_ids_B, condition.caption_BPC, condition.caption_mask_BP)))


def decode(model: ARTransformer, condition: Condition, inject: Tensor, rows: Sequence[int], **setting: Any) -> Tensor:
    """codes_BL of these samples of the whole set, decoded as one batch."""
    seeds_B = 100 + torch.tensor(rows)
    request = DecodeRequest(rows_of(condition, rows), (4, 4), seeds_B, inject[:, list(rows)], **setting)
    codes = PlainAR().decode(Target(model, request), request).codes_BL
    assert codes is not None
    return codes


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_independence_in_float64(conditioning: str, setting: dict[str, Any]) -> None:
    model = toy_model(conditioning=conditioning).double()
    condition = toy_classes(BATCH) if conditioning == "class" else toy_captions(BATCH)
    inject = toy_inject(BATCH).double()
    everyone = list(range(BATCH))
    together = decode(model, condition, inject, everyone, **setting)
    alone = torch.cat([decode(model, condition, inject, [k], **setting) for k in everyone])
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = torch.empty_like(together)
    shuffled[order] = decode(model, condition, inject, order, **setting)
    decode(model, condition, toy_inject(BATCH, seed=99).double(), everyone, **setting)
    after_another = decode(model, condition, inject, everyone, **setting)
    for name, codes in (("alone", alone), ("shuffled", shuffled), ("after another control", after_another)):
        assert torch.equal(codes, together), name
    assert len({tuple(row) for row in together.tolist()}) == BATCH


def test_seed_class_and_control_matter() -> None:
    model, inject, rows = toy_model().double(), toy_inject(BATCH).double(), list(range(BATCH))
    codes = decode(model, toy_classes(BATCH), inject, rows)
    other_class = Condition(class_ids_B=(torch.arange(BATCH) + 1) % 5)
    assert not torch.equal(decode(model, other_class, inject, rows), codes)
    assert not torch.equal(decode(model, toy_classes(BATCH), toy_inject(BATCH, seed=99).double(), rows), codes)
    request = DecodeRequest(toy_classes(BATCH), (4, 4), torch.arange(BATCH), inject)
    other_seed = PlainAR().decode(Target(model, request), request).codes_BL
    assert other_seed is not None and not torch.equal(other_seed, codes)
