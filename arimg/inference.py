"""How weights lie in memory while a network paints: the values, shapes and state-dict keys stay as they are."""

from __future__ import annotations

import torch
from torch import nn


def lay_out(network: nn.Module) -> nn.Module:
    """Store weights as their device reads them fastest. Returns the network.

    On a CPU in float32, weights of Linear layers lie column by column: a product with 1 to 3 rows, which is what a pass
    of plain decoding consists of, then takes 0.6 to 0.85 of the time, and wider ones take the same (docs/bench.md).
    Other precisions and devices want rows. Modules with a method `lay_out` of their own do it themselves. Call it again
    after a change of either.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            by_columns = weight.device.type == "cpu" and weight.dtype == torch.float32
            module.weight.data = weight.t().contiguous().t() if by_columns else weight.contiguous()
        elif callable(own := getattr(module, "lay_out", None)):
            own()
    return network
