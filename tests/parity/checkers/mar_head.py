"""The head's network: time features, output, and guided output without the second half that is thrown away."""

from __future__ import annotations

import torch

from arimg.models.diffusion_head import guide
from arimg.models.time_embedding import time_features
from tests.parity.checkers.mar_build import build_head
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    head = build_head(fixture.spec["config"], fixture.state_dict())
    t_N = fixture["in.t"]
    fixture.compare("out.t_sinusoid", time_features(t_N))
    fixture.compare("out.t_embed", head.net.time_embed(t_N))
    fixture.compare("out.head", head.net(fixture["in.x"], t_N, fixture["in.c"]))
    rows = len(t_N)
    z_GND, x_NC = fixture["in.c2"].unflatten(0, (2, rows)), fixture["in.x2"][:rows]
    out_GNC = torch.stack([head.net(x_NC, t_N, z_ND) for z_ND in z_GND])
    eps_GNC, v_GNC = out_GNC.chunk(2, dim=-1)
    guided_NC = guide(eps_GNC, torch.full((2, rows), fixture.spec["cfg_scale"]))
    fixture.compare("out.head_cfg", torch.cat([guided_NC.expand_as(eps_GNC), v_GNC], dim=-1).flatten(0, 1))
