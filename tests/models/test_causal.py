"""The causal model: one token per pass, all in one pass and ragged passes give the same conditions."""

from __future__ import annotations

import pytest
import torch

from arimg.accel.contexts import CausalContexts, Tokens
from arimg.accel.plan import branches_of, raster_plan
from arimg.errors import ConfigError, InputError
from arimg.models.base import Condition
from arimg.models.causal import CausalConfig
from tests.models.toy_continuous import SIDE, toy_causal, toy_inject, toy_request

LENGTH = SIDE ** 2


def latents_of(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, LENGTH, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("control", [False, True])
def test_steps_agree_with_the_teacher_forced_pass(control: bool) -> None:
    model, latents = toy_causal(), latents_of(3)
    request = toy_request(3, control)
    z = model(latents, request.condition, request.grid, request.inject_KBLD)
    contexts = CausalContexts(model, request, branches_of(request, "linear"))
    for step in range(LENGTH):
        tokens = Tokens(torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.full((3,), step))
        known = latents.clone()
        known[:, step:] = 1e3                                   # what is not known is not read
        z_G = contexts.read(known, torch.full((3, 1), step), tokens)
        torch.testing.assert_close(z_G[0], z[:, step], rtol=0, atol=1e-10)
    assert contexts.passes == LENGTH


def test_ragged_windows_and_replaced_tokens() -> None:
    """Rows at different places, with tokens that change after they were read (F3: a cache after a rollback)."""
    model, latents = toy_causal(), latents_of(2)
    request = toy_request(2)
    contexts = CausalContexts(model, request, branches_of(request, "linear"))
    plan = raster_plan(request, torch.ones(2, LENGTH, dtype=torch.bool))
    drafts = latents_of(2, seed=9)
    for cursors in ([0, 0], [1, 4], [3, 5], [6, 6], [7, 15]):
        cursor_B = torch.tensor(cursors)
        canvas = torch.where(torch.arange(LENGTH)[None, :, None] < cursor_B[:, None, None], latents, drafts)
        drafts = drafts.roll(1, 1)
        steps = (cursor_B[:, None] + torch.arange(3)).clamp(max=LENGTH)
        tokens = Tokens(*plan.predicted(steps).nonzero(as_tuple=True))
        z = contexts.read(canvas, steps, tokens)[0]
        fresh = model(canvas, request.condition, request.grid)
        torch.testing.assert_close(z, fresh[tokens.images_N, tokens.positions_N], rtol=0, atol=1e-10)
        contexts.forget(cursor_B)


def test_control_row_j_is_read_where_token_j_is_predicted() -> None:
    model, latents, inject = toy_causal(), latents_of(1), toy_inject(1)
    condition = Condition(class_ids_B=torch.tensor([1]))
    z = model(latents, condition, (SIDE, SIDE), inject)
    later = inject.clone()
    later[:, :, 5] += 1
    changed = (model(latents, condition, (SIDE, SIDE), later) - z).abs().amax(-1)[0] > 1e-9
    assert changed.tolist() == [j >= 5 for j in range(LENGTH)]


def test_the_class_and_the_null_class_matter() -> None:
    model, latents = toy_causal(), latents_of(1)
    one = Condition(class_ids_B=torch.tensor([1]))
    assert (model(latents, one, (SIDE, SIDE)) - model(latents, model.null(one), (SIDE, SIDE))).abs().max() > 1e-3


def test_errors() -> None:
    model = toy_causal()
    with pytest.raises(InputError, match="16 positions"):
        model.new_cache(1, 30, (5, 5))
    for call in (model.prefix, model.null):
        with pytest.raises(InputError, match="a class instead"):
            call(Condition(caption_BPC=torch.zeros(1, 2, 3)))
    for changes in ({"prefix_rows": 0}, {"heads": 5}, {"inject_layers": (24,)}):
        with pytest.raises(ConfigError):
            CausalConfig(**changes)                                             # type: ignore[arg-type]
