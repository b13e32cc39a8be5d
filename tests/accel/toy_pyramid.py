"""Distilled networks of the toy next-scale transformers, and requests for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.models.base import Condition
from arimg.models.var import VARTransformer
from tests.models.toy_students import perturb
from tests.models.toy_var import ENDS, LENGTH, SCALES, SIZES, toy_space, toy_var

CLASSES = Condition(class_ids_B=torch.tensor([1, 3]))
SPACE = toy_space()


def toy_teacher() -> VARTransformer:
    """In float64."""
    teacher: VARTransformer = perturb(toy_var())
    return teacher


def toy_inject() -> Tensor:
    """inject_KBLD."""
    return 0.3 * torch.randn(2, 2, LENGTH, SIZES["dim"], generator=torch.Generator().manual_seed(1)).double()


def request(**changes: Any) -> DecodeRequest:
    """Two pictures under control."""
    settings: dict[str, Any] = {"inject_KBLD": toy_inject(), "guidance": Guidance(2.0), "sampling": Sampling(top_k=9),
                                "space": SPACE} | changes
    return DecodeRequest(CLASSES, SCALES[-1], torch.arange(2), **settings)


def scale_of(j: int) -> int:
    """The scale of token j."""
    return next(k for k in range(len(SCALES)) if j < ENDS[k + 1])
