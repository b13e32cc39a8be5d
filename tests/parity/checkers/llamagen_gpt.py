"""LlamaGen's transformer: teacher-forced logits and losses, rotary table, greedy generation of every run."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.target import Target
from arimg.interop.llamagen import (ar_config_from_llamagen, guidance_interval, infer_ar_config,
                                    transformer_from_llamagen)
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    model = build(fixture)
    condition = stored_condition(fixture)
    check_config(fixture, model)
    check_teacher_forcing(fixture, model, condition)
    for run, settings in fixture.settings.get("runs", {}).items():
        check_run(fixture, model, condition, run, settings)


def build(fixture: Fixture) -> ARTransformer:
    """The model of the fixture's config with its weights."""
    model = ARTransformer(ARConfig(**ar_config_from_llamagen(fixture.spec["config"])))
    model.load_state_dict(transformer_from_llamagen(fixture.state_dict()))
    return model.eval()


def stored_condition(fixture: Fixture) -> Condition:
    """Class ids, or caption and mask."""
    if "in.class_ids" in fixture:
        return Condition(class_ids_B=fixture["in.class_ids"])
    return Condition(caption_BPC=fixture["in.caption"], caption_mask_BP=fixture["in.emb_mask"].bool())


def check_config(fixture: Fixture, model: ARTransformer) -> None:
    """What shapes tell about the config agrees with it."""
    inferred = infer_ar_config(fixture.state_dict(), heads=model.config.heads)
    for name, value in inferred.items():
        if name == "num_classes" and model.config.class_dropout == 0:
            continue                    # a table without null class looks like one class fewer
        given = getattr(model.config, name)
        assert value == given or (name == "kv_heads" and value is None and given == model.config.heads), (name, value)
    if "ffn_hidden" in fixture.spec:
        assert model.config.ffn_hidden == fixture.spec["ffn_hidden"]


@torch.no_grad()
def check_teacher_forcing(fixture: Fixture, model: ARTransformer, condition: Condition) -> None:
    """Logits with the condition and with its null twin, losses, rotary table, caption projection."""
    tokens_BL, grid = fixture["in.tokens"], square(model.config.block_size)
    mask_BSS = fixture["in.attn_mask"][:, 0, :-1, :-1] if "in.attn_mask" in fixture else None
    logits_BLV = model(tokens_BL, condition, grid)
    got: dict[str, Tensor] = {"out.logits": logits_BLV, "out.freqs_cis": model.rotary_table(grid)}
    for name in {"out.logits_null", "out.logits_uncond"} & set(fixture.outputs()):
        got[name] = model(tokens_BL, model.null(condition), grid)
    losses_BL = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none").view_as(tokens_BL)
    got["out.loss"] = losses_BL.mean()
    got["out.caption_tokens"] = model.prefix(condition)
    if "in.valid" in fixture:
        valid_BL = fixture["in.valid"][:, None].expand_as(losses_BL)
        got["out.loss_valid"] = (losses_BL * valid_BL).sum() / valid_BL.sum().clamp(min=1)
    if mask_BSS is not None:
        torch.testing.assert_close(model(tokens_BL, condition, grid, mask_BSS=mask_BSS), logits_BLV)
    for name in fixture.outputs():
        if name in got:
            fixture.compare(name, got[name])


@torch.no_grad()
def check_run(fixture: Fixture, model: ARTransformer, condition: Condition, run: str, settings: dict[str, Any],
              inject_KBLD: Tensor | None = None) -> None:
    """Tokens of the plain decoder; guided logits on the way, one position at a time and all in one pass.

    The released rotary reading knows no width, so one row of all tokens is as good as their true grid.
    """
    if not settings.get("emb_masks", True):
        condition = replace(condition, caption_mask_BP=None)
    scale, length = settings["cfg_scale"], fixture[f"out.greedy_tokens_{run}"].shape[1]
    guidance = Guidance(cfg=scale, interval=guidance_interval(settings.get("cfg_interval", -1)))
    request = DecodeRequest(
        condition, (1, length), torch.arange(condition.rows), inject_KBLD=inject_KBLD,
        guidance=guidance if scale > 1 else Guidance(), sampling=Sampling(top_k=fixture.settings.get("top_k", 1)))
    codes_BL = PlainAR().decode(Target(model, request), request).codes_BL
    assert codes_BL is not None
    fixture.compare(f"out.greedy_tokens_{run}", codes_BL)
    positions_BL = torch.arange(request.length).expand_as(codes_BL)
    target = Target(model, request)
    logits = [target.start_logits()]
    for j in range(request.length - 1):
        logits.append(target.step_logits(codes_BL[:, j:j + 1], positions_BL[:, j:j + 1], reached=j))
    fixture.compare(f"out.greedy_logits_{run}", torch.cat(logits, dim=1))
    target = Target(model, request)
    logits = [target.start_logits(), target.step_logits(codes_BL[:, :-1], positions_BL[:, :-1])]
    fixture.compare(f"out.greedy_logits_{run}", torch.cat(logits, dim=1))


def square(cells: int) -> tuple[int, int]:
    """(g, g)."""
    return isqrt(cells), isqrt(cells)
