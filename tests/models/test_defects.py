"""Defects of the originals that must not come back. Numbers: LlamaGen 1-10, ControlAR 11-22."""

from __future__ import annotations

from math import isqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance
from arimg.accel.target import Target
from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.control.fusion import combine, injection_layers
from arimg.errors import InputError
from arimg.models import layers
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from tests.models.toy import CAPTION, logits_by_steps, toy_captions, toy_classes, toy_codes, toy_inject, toy_model


def decode(model: ARTransformer, condition: Condition, grid: tuple[int, int] = (4, 4), **changes: Any) -> Tensor:
    request = DecodeRequest(condition, grid, torch.arange(condition.rows), **changes)
    codes = PlainAR().decode(Target(model, request), request).codes_BL
    assert codes is not None
    return codes


def test_defect_01_prefix_rotary_rows_zero_and_identity_option() -> None:
    assert not toy_model(rope_prefix="zero").rotary_table((4, 4))[0].any()
    identity = toy_model(rope_prefix="identity").rotary_table((4, 4))[0]
    assert torch.equal(identity, torch.tensor([1.0, 0.0]).expand(4, 2))
    logits = [toy_model(rope_prefix=kind)(toy_codes(1), toy_classes(1), (4, 4)) for kind in ("zero", "identity")]
    assert not torch.allclose(*logits, atol=1e-2)


def test_defect_02_null_caption_is_a_plain_buffer() -> None:
    model = toy_model(conditioning="text")
    null = model.cls_embedding.uncond_embedding
    assert "cls_embedding.uncond_embedding" in model.state_dict()
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())
    assert not isinstance(null, torch.nn.Parameter) and not null.requires_grad
    assert torch.equal(null, toy_model(seed=5, conditioning="text").cls_embedding.uncond_embedding)
    wide = toy_model(conditioning="text", caption_dim=512).cls_embedding.uncond_embedding
    assert isinstance(wide, Tensor) and float(wide.std()) == pytest.approx(512 ** -0.5, rel=0.05)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_defect_03_grouped_query_generation(kv_heads: int) -> None:
    model = toy_model(kv_heads=kv_heads)
    codes = decode(model, toy_classes(2), guidance=Guidance(cfg=2.0))
    torch.testing.assert_close(logits_by_steps(model, toy_classes(2), codes, (4, 4)),
                               model(codes, toy_classes(2), (4, 4)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_defect_03_generation_of_one_token(cfg: float) -> None:
    assert decode(toy_model(), toy_classes(3), (1, 1), guidance=Guidance(cfg=cfg)).shape == (3, 1)


@pytest.mark.parametrize("length", [1, 2, 7, 15, 16])
def test_defect_04_eval_forward_of_any_length(length: int) -> None:
    model, codes = toy_model(), toy_codes(2)
    full = model(codes, toy_classes(2), (4, 4))
    torch.testing.assert_close(model(codes[:, :length], toy_classes(2), (4, 4)), full[:, :length])


def test_defect_08_cache_is_not_in_the_module() -> None:
    model = toy_model()
    before = {name: id(value) for name, value in vars(model).items()}, model.state_dict().keys()
    decode(model, toy_classes(2), inject_KBLD=toy_inject(2), guidance=Guidance(cfg=2.0, control_cfg=3.0))
    assert ({name: id(value) for name, value in vars(model).items()}, model.state_dict().keys()) == before
    assert not any(name for module in model.modules() for name in vars(module) if "cache" in name)


def test_defect_08_passes_do_not_read_the_unwritten_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    attention = layers.attention

    def watched(q: Tensor, k: Tensor, *others: Any, **options: Any) -> Tensor:
        read.append(k.shape[2])
        return attention(q, k, *others, **options)

    monkeypatch.setattr(layers, "attention", watched)
    model = toy_model(layers=1, inject_layers=(0,), rope_grid="true")
    decode(model, toy_classes(1), (10, 20))
    assert read == [min(-(-seen // layers.EXTENT_STEP) * layers.EXTENT_STEP, 201) for seen in range(1, 201)]


def test_defect_09_nothing_is_patched_while_networks_are_built_and_used() -> None:
    """Sampling scripts of the originals replaced the initialisation of Linear and LayerNorm in the whole process."""
    before = [(kind, dict(vars(kind))) for kind in (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding)]
    model = toy_model()
    ControlAdapter(ControlConfig(dim=32))
    decode(model, toy_classes(1), guidance=Guidance(cfg=2.0))
    assert [(kind, dict(vars(kind))) for kind, _ in before] == before


def test_defect_10_any_caption_shape_and_grid() -> None:
    model = toy_model(conditioning="text", rope_grid="true")
    assert model.prefix_length == CAPTION[0] != 120
    assert decode(model, toy_captions(2), (3, 7), guidance=Guidance(cfg=2.0)).shape == (2, 21)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_defect_12_class_model_samples_under_control(cfg: float, dtype: torch.dtype) -> None:
    model = toy_model().to(dtype)
    free = decode(model, toy_classes(2), guidance=Guidance(cfg=cfg))
    led = decode(model, toy_classes(2), guidance=Guidance(cfg=cfg), inject_KBLD=toy_inject(2).to(dtype))
    assert not torch.equal(free, led)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_defect_13_strength_without_guidance(cfg: float) -> None:
    model, inject = toy_model(), toy_inject(1)
    codes = [decode(model, toy_classes(1), guidance=Guidance(cfg=cfg),
                    inject_KBLD=combine([inject], [scale], [0.0], [1.0])) for scale in (0.0, 0.5, 1.0)]
    assert torch.equal(codes[0], decode(model, toy_classes(1), guidance=Guidance(cfg=cfg)))
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[1], codes[2])


@pytest.mark.parametrize("layers", [4, 5, 7])
def test_defect_13_layer_counts_not_divisible_by_three(layers: int) -> None:
    places = injection_layers(layers)
    assert places == (0, layers // 3, 2 * (layers // 3))
    model = toy_model(layers=layers, inject_layers=places)
    assert decode(model, toy_classes(1), inject_KBLD=toy_inject(1)).shape == (1, 16)


def test_defect_14_teacher_forcing_is_the_same_in_eval_and_train_mode() -> None:
    model, codes, inject = toy_model(), toy_codes(2), toy_inject(2)
    evaluated = model(codes, toy_classes(2), (4, 4), inject)
    assert torch.equal(model.train()(codes, toy_classes(2), (4, 4), inject), evaluated)


def test_defect_15_control_does_not_shift_positions() -> None:
    model, codes = toy_model(), toy_codes(2)
    without = model(codes, toy_classes(2), (4, 4))
    assert torch.equal(model(codes, toy_classes(2), (4, 4), torch.zeros(3, 2, 16, 32)), without)
    cell = model.rotary_table((4, 4))[model.prefix_length + 5]         # token 5: row 1, column 1
    one = torch.tensor(1.0)
    assert torch.equal(cell[:2], cell[2:]) and torch.equal(cell[0], torch.stack([one.cos(), one.sin()]))


def test_defect_16_the_bound_on_a_size_is_the_product_of_its_sides() -> None:
    """ControlAR's resolution sampler compared the sum of the sides, and ran over the end of its rotary table."""
    model = toy_model()
    for grid in ((2, 8), (8, 2), (1, 16), (3, 5)):
        assert decode(model, toy_classes(1), grid).shape == (1, grid[0] * grid[1])
    with pytest.raises(InputError, match="grid 4x5 has 20 tokens: this model's rotary table ends at 16"):
        decode(model, toy_classes(1), (4, 5))


def test_defect_17_positions_follow_the_true_width_and_not_a_command_line_size() -> None:
    table, true = toy_model(), toy_model(rope_grid="true")
    assert table.config.block_size == 16 and isqrt(table.config.block_size) == 4      # the grid belongs to the weights
    assert torch.equal(table.rotary_table((4, 4)), true.rotary_table((4, 4)))
    assert torch.equal(table.rotary_table((2, 6)), table.rotary_table((4, 4))[:13])   # released reading
    cell = true.rotary_table((2, 6))[1 + 7]                                           # token 7: row 1, column 1
    assert torch.equal(cell, table.rotary_table((4, 4))[1 + 5])


def test_defect_21_every_parameter_is_used() -> None:
    for conditioning, condition in (("class", toy_classes(2)), ("text", toy_captions(2))):
        model = toy_model(conditioning=conditioning)
        codes = toy_codes(2)
        F.cross_entropy(model(codes, condition, (4, 4)).flatten(0, 1), codes.flatten()).backward()
        unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not unused, unused


def test_defect_21_interleaved_decodes_do_not_meet() -> None:
    model = toy_model()
    requests = [DecodeRequest(toy_classes(1), (4, 4), torch.tensor([seed]), inject_KBLD=toy_inject(1, seed=seed))
                for seed in (1, 2)]
    alone = [PlainAR().decode(Target(model, request), request).codes_BL for request in requests]
    targets, codes = [Target(model, request) for request in requests], [torch.zeros(1, 16, dtype=torch.int64)] * 2
    with torch.no_grad():
        laws = [target.start() for target in targets]
        for j in range(16):
            for i, target in enumerate(targets):
                drawn = target.draw(laws[i], torch.tensor([[j]]))
                codes[i] = torch.cat([codes[i][:, :j], drawn, codes[i][:, j + 1:]], dim=1)
                laws[i] = target.step(drawn, torch.tensor([[j]]))
    for one, other in zip(codes, alone):
        assert other is not None and torch.equal(one, other)
