"""The next-scale transformer: sizes, what sees what, its cache, conditions, precision and initialisation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.errors import ConfigError, InputError
from arimg.interop.var import infer_var_config, transformer_from_var
from arimg.models.base import Condition, order_of
from arimg.models.var import VARConfig, VARTransformer
from arimg.presets import VAR_PRESETS
from tests.models.toy_var import CLASSES, ENDS, LENGTH, SCALES, toy_cells, toy_classes, toy_inject, toy_var

LAYOUTS = json.loads((Path(__file__).parents[1] / "data/parity/var_dd_state_dicts.json").read_text())["models"]
RELEASED = {name: layout for name, layout in LAYOUTS.items() if name.startswith("var_")}
VARIANTS: list[dict[str, Any]] = [{}, {"shared_adaln": True}, {"l2_attention": False},
                                  {"scales": ((2, 1), (2, 2), (3, 4))}]


def released_state(layout: dict[str, Any]) -> dict[str, Tensor]:
    """The full-size keys and shapes, without memory."""
    state = {}
    for key, shape, *count in layout["keys"]:
        for i in range(count[0] if count else 1):
            state[key.format(i=i)] = torch.empty(shape, device="meta")
    return state


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name: str) -> None:
    preset = VAR_PRESETS[name.split("_")[1]]
    with torch.device("meta"):
        model = VARTransformer(VARConfig(**preset.config()))
    assert sum(parameter.numel() for parameter in model.parameters()) == RELEASED[name]["params"]
    state = transformer_from_var(released_state(RELEASED[name]))
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()}
    assert VARConfig(**infer_var_config(state)) == model.config


@torch.no_grad()
def forced(model: VARTransformer, cells: Tensor, inject: Tensor | None = None) -> Tensor:
    logits: Tensor = model(cells, toy_classes(len(cells)), inject)
    return logits


@torch.no_grad()
def by_passes(model: VARTransformer, cells: Tensor, inject: Tensor, stops: tuple[int, ...]) -> Tensor:
    """logits_BLV of passes that end at these slots, through the storing cache."""
    batch, prefix = len(cells), model.prefix_length
    x = torch.cat([model.prefix(toy_classes(batch)), model.embed(cells, torch.empty(0))], dim=1)
    cache = model.new_cache(batch, x.shape[1], model.config.scales[-1])
    logits = []
    for start, stop in pairwise((0, prefix, *stops)):
        slots = torch.arange(start, stop).expand(batch, -1)
        logits.append(model.logits(model.step(x[:, start:stop], slots, cache, inject[:, :, start:stop])))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("changes", VARIANTS)
def test_passes_scale_by_scale_and_several_at_once_equal_one_pass(changes: dict[str, Any]) -> None:
    model = toy_var(**changes).double()
    ends = [sum(model.config.sizes[:k]) for k in range(1, 4)]
    cells, inject = toy_cells(2, ends[-1] - ends[0]).double(), toy_inject(2, ends[-1]).double()
    whole = forced(model, cells, inject)
    torch.testing.assert_close(by_passes(model, cells, inject, tuple(ends[1:])), whole)
    torch.testing.assert_close(by_passes(model, cells, inject, (ends[-1],)), whole)


def test_a_scale_may_be_read_again_by_some_rows() -> None:
    model, cells = toy_var().double(), toy_cells(2).double()
    other = toy_cells(2, seed=9).double()
    mixed = torch.cat([other[:, :ENDS[2] - 1], cells[:, ENDS[2] - 1:]], dim=1)
    cache = model.new_cache(2, LENGTH, SCALES[-1])
    x = torch.cat([model.prefix(toy_classes(2)), model.embed(cells, torch.empty(0))], dim=1)
    slots = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        model.step(x[:, :1], slots[:, :1], cache)
        model.step(model.embed(other[:, :4], slots), slots[:, 1:5], cache)
        model.step(x[:, 5:], slots[:, 5:], cache)
        model.step(x[:1, 1:5], slots[:1, 1:5], cache)
        again = model.logits(model.step(x[:, 5:], slots[:, 5:], cache))
    torch.testing.assert_close(again[0], forced(model, cells)[0, 5:])
    torch.testing.assert_close(again[1], forced(model, mixed)[1, 5:])


@pytest.mark.parametrize("slot", range(LENGTH))
@pytest.mark.parametrize("changes", VARIANTS[:2])
def test_what_a_slot_reads_and_its_control_move_its_scale_and_finer_ones(slot: int, changes: dict[str, Any]) -> None:
    model = toy_var(**changes).double()
    cells, inject = toy_cells(1).double(), toy_inject(1).double()
    scale = next(k for k, stop in enumerate(ENDS[1:]) if slot < stop)
    before, other_cells, other_inject = forced(model, cells, inject), cells.clone(), inject.clone()
    other_inject[:, :, slot] += 0.5
    cases = [forced(model, cells, other_inject)]
    if slot >= ENDS[1]:
        other_cells[:, slot - ENDS[1]] += 0.5
        cases.append(forced(model, other_cells, inject))
    for after in cases:
        moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(ENDS[scale], LENGTH))


def test_labels_are_dropped_on_request_alone() -> None:
    """The released forward() drops labels at random, in eval mode too."""
    model, condition = toy_var(class_dropout=0.9), toy_classes(4)
    assert all(torch.equal(forced(model, toy_cells(4)), forced(model, toy_cells(4))) for _ in range(3))
    dropped = model.drop(condition, torch.tensor([True, False, True, False])).class_ids_B
    assert dropped is not None and dropped.tolist() == [CLASSES, 1, CLASSES, 3]
    assert model.null(condition).class_ids_B.tolist() == [CLASSES] * 4      # type: ignore[union-attr]
    with pytest.raises(InputError, match="a caption"):
        model.prefix(Condition(caption_BPC=torch.zeros(1, 2, 3)))


def test_whole_rows_of_branches_are_dropped_in_training_alone() -> None:
    model = toy_var(layers=2, drop_path=0.5, inject_layers=())
    assert [block.drop_path.p for block in model.blocks] == [0.0, 0.5]
    cells, classes = toy_cells(64), Condition(class_ids_B=torch.zeros(64, dtype=torch.int64))
    same = cells[:1].expand(64, -1, -1)
    assert torch.equal(model(same, classes), model(same, classes))
    torch.manual_seed(0)
    rows = model.train()(same, classes).detach()
    assert len(rows.flatten(1).unique(dim=0)) == 4, "attention and FFN of the last block, each there or not"


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_reach_every_weight(changes: dict[str, Any]) -> None:
    model = toy_var(**changes)
    ends = sum(model.config.sizes)
    model(toy_cells(5, ends - model.config.sizes[0]), toy_classes(5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize("changes", VARIANTS)
def test_blocks_computed_again_give_the_same_gradients(changes: dict[str, Any]) -> None:
    model = toy_var(**changes)
    cells = toy_cells(2, sum(model.config.sizes) - model.config.sizes[0])
    model(cells, toy_classes(2)).square().sum().backward()
    kept = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.checkpoint_blocks = True
    model(cells, toy_classes(2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[name])


@pytest.mark.parametrize("changes", VARIANTS)
def test_bfloat16_stays_finite_and_near(changes: dict[str, Any]) -> None:
    model = VARTransformer(VARConfig(vocab_size=20, codebook_dim=6, dim=32, layers=2, heads=4, num_classes=CLASSES,
                                     gamma_init=1.0, **{"scales": SCALES, **changes})).eval()
    ends = sum(model.config.sizes)
    cells = toy_cells(3, ends - model.config.sizes[0])
    exact, narrow = forced(model, cells), forced(model.bfloat16(), cells)
    assert narrow.dtype == torch.float32 and bool(narrow.isfinite().all())
    torch.testing.assert_close(narrow, exact, atol=0.02 * float(exact.abs().max()), rtol=0.05)


def test_zero_queries_and_huge_temperatures_give_no_nan() -> None:
    model = toy_var()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.mat_qkv.weight.zero_()
            block.attn.q_bias.zero_()
            block.attn.scale_mul_1H11.fill_(1e4)
    assert bool(forced(model, toy_cells(2)).isfinite().all())
    assert bool(forced(model.bfloat16(), 1e4 * toy_cells(2)).isfinite().all())


def test_attention_backends_agree() -> None:
    model, cells = toy_var(), toy_cells(2)
    reference = forced(model, cells)
    model.attention_backend = "math"
    torch.testing.assert_close(forced(model, cells), reference)


@pytest.mark.parametrize("shared", [False, True])
def test_a_new_model_starts_near_uniform_with_thin_branches(shared: bool) -> None:
    torch.manual_seed(0)
    model = VARTransformer(VARConfig(vocab_size=64, dim=128, layers=4, heads=2, shared_adaln=shared, num_classes=10))
    std = (3 * 128) ** -0.5
    block = model.blocks[1]
    expected = {"pos_1LC": std, "lvl_embed.weight": std, "head.weight": 0.02 * std,
                "head_nm.ada_lin.1.weight": 0.5 * std, "blocks.1.attn.mat_qkv.weight": std,
                "blocks.1.attn.proj.weight": std / 8 ** 0.5, "blocks.1.ffn.fc2.weight": std / 8 ** 0.5}
    for name, value in expected.items():
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(value, rel=0.1), name
    six = (block.ada_gss[0, 0] if shared else block.ada_lin[1].weight.view(6, -1)).detach()
    own = 128 ** -0.5 if shared else std
    assert float(six[:2].std()) == pytest.approx(1e-3 * own, rel=0.2)
    assert float(six[2:].std()) == pytest.approx(0.5 * own, rel=0.2)
    assert not any(bool(tensor.any()) for name, tensor in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("changes, message", [
    ({"heads": 5}, "multiple of heads"), ({"scales": ()}, "at least one"),
    ({"scales": ((2, 2), (1, 1))}, "coarse to fine"), ({"scales": ((0, 1),)}, "positive"),
    ({"drop_path": 1.0}, "rate"), ({"inject_layers": (3,)}, "0 to 2"),
])
def test_configs_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_var(**changes)


def test_another_grid_is_refused() -> None:
    with pytest.raises(InputError, match="2x3 tokens only"):
        toy_var().new_cache(1, LENGTH, (4, 4))


def test_the_order_is_that_of_scales() -> None:
    assert order_of(toy_var()) == "scales" and order_of(object()) == "raster"
