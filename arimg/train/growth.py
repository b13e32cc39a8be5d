"""Deeper networks from shallower trained ones: a new layer starts as the identity, so nothing learnt is lost (Net2Net,
Chen et al. 2016, arXiv:1511.05641, section 2.3; in a residual network a branch whose last product is zero)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from arimg.errors import ConfigError

_STACKS = ("layers", "encoder.vit.blocks")                                      # of ARTransformer, of ControlAdapter
_BRANCH_ENDS = ("attention.wo", "feed_forward.w2", "attn.proj", "mlp.fc2")      # of their blocks


def deepened(network: nn.Module, state: Mapping[str, Tensor], new_layers: Sequence[int]) -> dict[str, Tensor]:
    """The state dict of a network without the layers `new_layers` (numbers among those of `network`) as one of
    `network`, which computes the same: the new layers keep their fresh weights, with zero at the end of each branch.

    Raises ConfigError for numbers that are no layers of this network, or name one twice, and for other networks.
    """
    own = network.state_dict()
    stack = next((name for name in _STACKS if any(key.startswith(f"{name}.0.") for key in own)), None)
    if stack is None:
        raise ConfigError(f"new layers for {type(network).__name__}: only the AR transformer and the small control "
                          "encoder can grow")
    count = len(network.get_submodule(stack))       # type: ignore[arg-type]
    if len(set(new_layers)) < len(new_layers) or not all(0 <= number < count for number in new_layers):
        raise ConfigError(f"new layers {list(new_layers)}: must be different numbers from 0 to {count - 1}")
    kept = [number for number in range(count) if number not in new_layers]
    pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.*)")
    moved = {}
    for key, tensor in state.items():
        found = pattern.fullmatch(key)
        if found and int(found[1]) < len(kept):
            key = f"{stack}.{kept[int(found[1])]}.{found[2]}"
        moved[key] = tensor
    for key, tensor in own.items():
        found = pattern.fullmatch(key)
        if found and int(found[1]) in new_layers:
            ends = found[2].rpartition(".")[0] in _BRANCH_ENDS
            moved[key] = torch.zeros_like(tensor) if ends else tensor
    return moved
