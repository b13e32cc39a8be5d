"""Patches, the masked encoder and the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arimg.models.base import Condition
from tests.parity.checkers.mar_build import build_mar, unpatched
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    model = build_mar(fixture.spec["config"], fixture.state_dict())
    tokens_BChw = F.pixel_unshuffle(fixture["in.latents"], model.config.patch)      # as the tokenizer does
    tokens_BLC = tokens_BChw.flatten(2).mT
    fixture.compare("out.tokens", tokens_BLC)
    fixture.compare("out.unpatchified", unpatched(tokens_BLC, model))
    condition = Condition(class_ids_B=fixture["in.labels"])
    fixture.compare("out.class_embedding", model.class_rows(condition))
    known_BL = fixture["in.mask"] == 0
    for suffix, here, known in (("", condition, known_BL), ("_uncond", model.null(condition), known_BL),
                                ("_allmasked", condition, torch.zeros_like(known_BL))):
        fixture.compare(f"out.enc{suffix}", model.encode(here, tokens_BLC, known).h_BSE)
        fixture.compare(f"out.z{suffix}", model.context(here, tokens_BLC, known))
