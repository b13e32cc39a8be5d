"""MAR with weights and activations in 8 bits: near the floats, row by row, and only where it pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from arimg.accel.masked import Masked
from arimg.accel.target import Target
from arimg.errors import CheckpointError
from arimg.quantize import Int8Linear, Int8RowsLinear, quantize
from tests.models.toy_continuous import one_of, toy_causal, toy_mar, toy_request


def test_products_are_those_of_the_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(2, 7, 64, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    with torch.no_grad():
        linear.weight.copy_(torch.randn(48, 64, generator=generator))
        ours, exact = Int8RowsLinear(linear)(x), linear(x)
        alone = Int8RowsLinear(linear)(x[1, 3])
    errors = (ours - exact).square().mean(-1).sqrt() / (exact - linear.bias).square().mean(-1).sqrt()
    assert errors.max() < 0.03, "every row has a scale of its own"
    assert torch.equal(alone, ours[1, 3])
    assert not ours.isnan().any() and torch.equal(Int8RowsLinear(linear)(torch.zeros(1, 64)), linear.bias[None])


def test_blocks_are_replaced_and_the_head_is_not() -> None:
    network = quantize(toy_mar().float(), "int8")
    kinds = {name for name, module in network.named_modules() if isinstance(module, Int8RowsLinear)}
    assert len(kinds) == 4 * 4 and all(name.startswith(("encoder_blocks", "decoder_blocks")) for name in kinds)
    with pytest.raises(CheckpointError, match="full precision"):
        network.state_dict()
    causal = quantize(toy_causal().float(), "int8")
    assert any(isinstance(module, Int8Linear) for module in causal.modules())
    assert not any(isinstance(module, Int8RowsLinear) for module in causal.modules())


def test_contexts_are_near_and_pictures_do_not_depend_on_their_batch() -> None:
    plain, network = toy_mar().float(), quantize(toy_mar().float(), "int8")
    request = toy_request(4, True, cfg=2.0, steps=5)
    request = replace(request, inject_KBLD=request.inject_KBLD.float())
    known = torch.arange(16)[None] < torch.tensor([[0], [3], [9], [15]])
    tokens = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, exact = (one.context(request.condition, tokens, known, request.inject_KBLD) for one in (network, plain))
    assert 0 < float((z - exact).std() / exact.std()) < 0.05
    together, alone = (Masked().decode(Target(network, one), one).latents_BLC for one in (request, one_of(request, 2)))
    torch.testing.assert_close(alone[0], together[2], rtol=1e-4, atol=1e-4)
