"""The cost of passes by width. No test asserts a time."""

from __future__ import annotations

import torch

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance
from arimg.accel.cost import cost_curve
from arimg.accel.target import Target
from arimg.models.base import Condition
from tests.toy import toy_pipeline


def test_widths_up_to_the_length_and_a_target_that_starts_again() -> None:
    backbone = toy_pipeline().transformer
    request = DecodeRequest(Condition(class_ids_B=torch.tensor([0, 1])), (4, 4), torch.tensor([5, 6]),
                            guidance=Guidance(2.0))
    target = Target(backbone, request)
    curve = cost_curve(target, (3, 1, 16, 17), repeats=2)
    assert list(curve) == [3, 1, 16] and min(curve.values()) > 0
    assert target.forward_passes == 2 + 3 * 3           # prefix, full cache, then three turns of three widths
    after, fresh = (PlainAR().decode(one, request).codes_BL for one in (target, Target(backbone, request)))
    assert after is not None and fresh is not None and torch.equal(after, fresh)
