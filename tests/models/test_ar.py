from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from arimg.errors import ConfigError, InputError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from tests.models.toy import (CAPTION, CLASSES, SIZES, logits_by_steps, toy_captions, toy_classes, toy_codes,
                              toy_inject, toy_model)


@pytest.mark.parametrize("changes, message", [
    ({"heads": 3}, "dim 32 with 3 heads: each head needs a multiple of 4 channels"),
    ({"dim": 24, "heads": 4}, "dim 24 with 4 heads: each head needs a multiple of 4 channels"),
    ({"kv_heads": 3}, r"kv_heads 3: must divide heads \(4\)"),
    ({"block_size": 15}, "block_size 15: needs a square number"),
    ({"conditioning": "image"}, "conditioning 'image': choose class or text"),
    ({"rope_prefix": "one"}, "rope_prefix 'one': choose zero or identity"),
    ({"rope_grid": "wide"}, "rope_grid 'wide': choose table or true"),
    ({"inject_layers": (0, 3)}, r"inject_layers \[0, 3\]: the layers are 0 to 2"),
])
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ARConfig(**{**SIZES, **changes})


def test_config_takes_lists_from_json() -> None:
    assert ARConfig(**{**SIZES, "inject_layers": [0, 1]}).inject_layers == (0, 1)


def test_initial_weights() -> None:
    model = ARTransformer(ARConfig(**{**SIZES, "dim": 128, "codebook_dim": 8}))
    assert not model.output.weight.any()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name != "output.weight" and parameter.ndim == 2:
            assert 0.018 < float(parameter.detach().std()) < 0.022, name


VARIANTS: list[dict[str, Any]] = [
    {}, {"kv_heads": 2}, {"kv_heads": 1}, {"rope_prefix": "identity", "rope_grid": "true"}, {"codebook_dim": 4},
    {"conditioning": "text"}, {"conditioning": "text", "kv_heads": 2, "rope_prefix": "identity"}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_cache_equals_teacher_forcing(changes: dict[str, Any], grid: tuple[int, int]) -> None:
    model, length = toy_model(**changes), grid[0] * grid[1]
    if model.config.codebook_dim:
        model.set_codebook(torch.randn(32, 4, generator=torch.Generator().manual_seed(9)))
    condition = toy_captions(4) if model.config.conditioning == "text" else toy_classes(4)
    codes, inject = toy_codes(4, length), toy_inject(4, length)
    torch.testing.assert_close(logits_by_steps(model, condition, codes, grid, inject),
                               model(codes, condition, grid, inject).detach(), rtol=1e-4, atol=1e-4)


def test_ragged_windows_and_rewritten_slots() -> None:
    model, codes, condition = toy_model().double(), toy_codes(2, 6), toy_classes(2)
    expected = model(codes, condition, (2, 3)).detach()
    with torch.no_grad():
        cache = model.new_cache(2, 7, (2, 3))
        model.step(model.prefix(condition), torch.zeros(2, 1, dtype=torch.int64), cache)
        wrong = (codes + 1) % 32
        slots = torch.tensor([[1, 2, 3], [1, 2, 3]])
        model.step(model.embed(wrong[:, :3], slots), slots, cache)              # drafts, to be replaced
        model.step(model.embed(codes[:, :1], slots[:, :1]), slots[:, :1], cache)
        slots = torch.tensor([[2, 3], [2, 3]])
        model.step(model.embed(torch.stack([codes[0, 1:3], wrong[1, 1:3]]), slots), slots, cache)
        slots = torch.tensor([[4, 5], [2, 3]])                                  # row 0 is two tokens ahead
        h = model.step(model.embed(torch.stack([codes[0, 3:5], codes[1, 1:3]]), slots), slots, cache)
    logits = model.logits(h)
    torch.testing.assert_close(logits[0], expected[0, 4:6])
    torch.testing.assert_close(logits[1], expected[1, 2:4])


def test_a_pass_of_fewer_rows_leaves_the_others_alone() -> None:
    model, codes = toy_model().double(), toy_codes(3, 4)
    condition, slot = toy_classes(3), torch.ones(3, 1, dtype=torch.int64)
    with torch.no_grad():
        cache = model.new_cache(3, 5, (2, 2))
        model.step(model.prefix(condition), 0 * slot, cache)
        h = model.step(model.embed(codes[:2, :1], slot[:2]), slot[:2], cache)
        late = model.step(model.embed(codes[2:, :1].expand(3, 1), slot), slot, cache)[2:]
    expected = model(codes, condition, (2, 2)).detach()
    torch.testing.assert_close(model.logits(torch.cat([h, late])), expected[:, 1:2])


def test_padded_caption_slots_do_not_matter() -> None:
    model, condition, codes = toy_model(conditioning="text"), toy_captions(3), toy_codes(3)
    assert condition.caption_BPC is not None and condition.caption_mask_BP is not None
    noisy = torch.where(condition.caption_mask_BP[..., None], condition.caption_BPC, 100.0)
    changed = Condition(caption_BPC=noisy, caption_mask_BP=condition.caption_mask_BP)
    torch.testing.assert_close(model(codes, changed, (4, 4)), model(codes, condition, (4, 4)))
    unmasked = Condition(caption_BPC=condition.caption_BPC)
    assert not torch.allclose(model(codes, unmasked, (4, 4))[0], model(codes, condition, (4, 4))[0], atol=1e-3)


@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("point", [0, 1, 2])
def test_injected_row_j_acts_from_token_j_on(conditioning: str, point: int) -> None:
    model, codes, j = toy_model(conditioning=conditioning), toy_codes(1), 6
    condition = toy_classes(1) if conditioning == "class" else toy_captions(1)
    inject = torch.zeros(3, 1, 16, 32)
    plain = model(codes, condition, (4, 4), inject)
    inject[point, 0, j] = 1.0
    moved = (model(codes, condition, (4, 4), inject) - plain).abs().amax(-1)[0]
    assert not moved[:j].any()
    assert moved[j] > 1e-2 and moved[j + 1:].max() > 1e-3


def test_injection_k_is_added_before_its_layer() -> None:
    model, codes = toy_model(inject_layers=(2, 2)), toy_codes(1)
    a, b = toy_inject(1, points=2)
    both = model(codes, toy_classes(1), (4, 4), torch.stack([a, b]))
    torch.testing.assert_close(model(codes, toy_classes(1), (4, 4), torch.stack([a + b, 0 * a])), both)
    first = toy_model(inject_layers=(0, 2))(codes, toy_classes(1), (4, 4), torch.stack([a, b]))
    assert not torch.allclose(first, both, atol=1e-2)


def test_codebook_tied_embedding_and_head() -> None:
    model = toy_model(codebook_dim=4).double()
    codebook = torch.randn(32, 4, dtype=torch.float64)
    model.set_codebook(codebook)
    codes, slots = toy_codes(1, 3), torch.arange(1, 4)[None]
    torch.testing.assert_close(model.embed(codes, slots)[0],
                               model.tok_embeddings.weight[codes[0]] + codebook[codes[0]] @ model.codebook_in.weight.T)
    h = torch.randn(1, 2, 32, dtype=torch.float64)
    projected = h @ model.codebook_out.weight.T
    torch.testing.assert_close(model.logits(h),
                               h @ model.output.weight.T + model.codebook_scale * (projected @ codebook.T))
    assert torch.equal(model.state_dict()["codebook"], codebook)


def test_codebook_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"codebook of shape \(32, 8\).*\(32, 4\)"):
        toy_model(codebook_dim=4).set_codebook(torch.zeros(32, 8))
    with pytest.raises(ConfigError, match=r"codebook of shape \(32, 8\).*\(32, None\)"):
        toy_model().set_codebook(torch.zeros(32, 8))


def test_drop_and_null() -> None:
    model = toy_model()
    dropped = model.drop(toy_classes(3), torch.tensor([True, False, True])).class_ids_B
    assert dropped is not None and dropped.tolist() == [CLASSES, 1, CLASSES]
    text, condition = toy_model(conditioning="text"), toy_captions(2)
    null = text.null(condition)
    assert null.caption_BPC is not None and null.caption_mask_BP is condition.caption_mask_BP
    assert torch.equal(null.caption_BPC[1], text.cls_embedding.uncond_embedding)


def test_condition_errors() -> None:
    with pytest.raises(InputError, match="a caption for a class-conditional model"):
        toy_model().prefix(toy_captions(1))
    text = toy_model(conditioning="text")
    with pytest.raises(InputError, match="a class for a text-conditional model"):
        text.prefix(toy_classes(1))
    with pytest.raises(InputError, match=r"caption features of shape \(7, 11\): this model reads \(7, 12\)"):
        text.prefix(Condition(caption_BPC=torch.zeros(1, CAPTION[0], 11)))
    with pytest.raises(InputError, match="no guidance; use --cfg 1"):
        toy_model(class_dropout=0.0).null(toy_classes(1))


def test_grid_beyond_the_released_table() -> None:
    with pytest.raises(InputError, match="grid 2x9 has 18 tokens: this model's rotary table ends at 16"):
        toy_model().rotary_table((2, 9))
    assert toy_model(rope_grid="true").rotary_table((2, 9)).shape == (19, 4, 2)


def test_rotary_table_is_exact_in_bfloat16() -> None:
    model = toy_model(rope_grid="true")
    table = model.rotary_table((4, 4))
    assert table.dtype == torch.float32 and torch.equal(model.bfloat16().rotary_table((4, 4)), table)


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_bfloat16_decodes(conditioning: str) -> None:
    model = toy_model(conditioning=conditioning).bfloat16()
    condition = toy_classes(2) if conditioning == "class" else toy_captions(2)
    logits = logits_by_steps(model, condition, toy_codes(2), (4, 4), toy_inject(2))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    model = toy_model(token_dropout=0.5, residual_dropout=0.5, ffn_dropout=0.5)
    codes, condition = toy_codes(1), toy_classes(1)
    assert torch.equal(model(codes, condition, (4, 4)), model(codes, condition, (4, 4)))
    model.train()
    assert not torch.equal(model(codes, condition, (4, 4)), model(codes, condition, (4, 4)))


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_training_compiles_without_graph_breaks(conditioning: str) -> None:
    model = toy_model(conditioning=conditioning, codebook_dim=4).train()
    condition = toy_classes(2) if conditioning == "class" else toy_captions(2)
    codes, inject = toy_codes(2), toy_inject(2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = F.cross_entropy(compiled(codes, condition, (4, 4), inject).flatten(0, 1), codes.flatten())
    torch.testing.assert_close(
        loss, F.cross_entropy(model(codes, condition, (4, 4), inject).flatten(0, 1), codes.flatten()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_attention_backend_is_reached_by_the_model() -> None:
    model, codes, condition = toy_model(), toy_codes(1), toy_classes(1)
    expected = model(codes, condition, (4, 4))
    model.attention_backend = "math"
    torch.testing.assert_close(model(codes, condition, (4, 4)), expected)


def test_a_dropout_may_be_written_as_a_whole_number() -> None:
    assert ARConfig(token_dropout=0, ffn_dropout=1).token_dropout == 0
