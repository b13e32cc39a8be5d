"""Every attention backend gives what sdpa gives, on every published shape at toy width, or says why it does not run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from arimg.models import layers
from arimg.presets import AR_PRESETS, MAR_PRESETS, VAR_PRESETS
from tests.models import toy, toy_continuous, toy_var
from tests.models.test_mar import inputs

CHANNELS = 4            # per head; released models have 64 to 128
LAYERS = 3
BACKENDS = sorted(set(layers._BACKENDS) - {"sdpa"})
Forward = Callable[[], Tensor]


def ar(name: str, conditioning: str) -> tuple[nn.Module, Forward]:
    preset = AR_PRESETS[name]
    model = toy.toy_model(heads=preset.heads, dim=CHANNELS * preset.heads, layers=LAYERS, conditioning=conditioning,
                          ffn_hidden=CHANNELS * preset.heads * preset.ffn_hidden // preset.dim, inject_layers=())
    condition = toy.toy_classes(2) if conditioning == "class" else toy.toy_captions(2)
    return model, lambda: model(toy.toy_codes(2), condition, (4, 4)).softmax(-1)


def var(name: str, conditioning: str) -> tuple[nn.Module, Forward]:
    preset = VAR_PRESETS[name]
    heads = preset.config()["heads"]
    model = toy_var.toy_var(heads=heads, dim=CHANNELS * heads, layers=LAYERS, shared_adaln=preset.shared_adaln,
                            inject_layers=())
    return model, lambda: model(toy_var.toy_cells(2), toy_var.toy_classes(2), None).softmax(-1)


def mar(name: str, conditioning: str) -> tuple[nn.Module, Forward]:
    heads = MAR_PRESETS[name].heads
    model = toy_continuous.toy_mar(encoder_heads=heads, decoder_heads=heads, encoder_dim=CHANNELS * heads,
                                   decoder_dim=CHANNELS * heads, inject_encoder=(), inject_decoder=())
    return model, lambda: model.context(*inputs())


PRESETS = [*((ar, name, kind) for name in AR_PRESETS for kind in ("class", "text")),
           *((var, name, "class") for name in VAR_PRESETS), *((mar, name, "class") for name in MAR_PRESETS)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("build", "name", "conditioning"), PRESETS,
                         ids=[f"{build.__name__}-{name}-{kind}" for build, name, kind in PRESETS])
@torch.no_grad()
def test_backends_agree_with_sdpa(build: Callable[[str, str], tuple[nn.Module, Forward]], name: str, conditioning: str,
                                  backend: str) -> None:
    if reason := layers._obstacle(backend, torch.zeros(1)):
        pytest.skip(f"{backend}: {reason}")
    model, forward = build(name, conditioning)
    expected = forward()
    model.attention_backend = backend
    torch.testing.assert_close(forward(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_training_in_bfloat16_follows_float32(masked: bool) -> None:
    """Forward and backward: on CPUs sdpa takes another way there."""
    generator = torch.Generator().manual_seed(0)
    inputs_32 = [torch.randn(2, 3, 24, 8, generator=generator).requires_grad_() for _ in range(3)]
    inputs_16 = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs_32]
    mask = torch.rand(2, 1, 24, 24, generator=generator) < 0.5 if masked else None
    mask = mask | torch.eye(24, dtype=torch.bool) if mask is not None else None
    outs = [layers.attention(*tensors, mask, causal=not masked) for tensors in (inputs_32, inputs_16)]
    for out in outs:
        out.float().square().sum().backward()
    pairs = [(outs[1].detach(), outs[0].detach()), *((a.grad, b.grad) for a, b in zip(inputs_16, inputs_32))]
    for got, wanted in pairs:
        assert got is not None and wanted is not None
        assert float((got.float() - wanted).norm() / wanted.norm()) < 0.05
