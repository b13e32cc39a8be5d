"""A toy transformer whose codes depend on the codes before them: with the weights of tests.models.toy its laws are
nearly flat and follow the control, so that almost every draft would be right whatever its context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg.models.ar import ARTransformer
from tests.models.toy import toy_inject, toy_model


def attentive_model(**changes: Any) -> ARTransformer:
    """In float64."""
    model = toy_model(**changes).double()
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(2)
        model.output.weight.mul_(10)
        for name, weight in model.named_parameters():
            if ".attention.w" in name:
                weight.mul_(4)
    return model


def faint_inject(batch: int, **changes: Any) -> Tensor:
    """inject_KBLD in float64, no louder than the codes."""
    return 0.3 * toy_inject(batch, **changes).double()
