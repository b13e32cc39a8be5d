"""Complete generation runs by the decoder `masked`, with the recorded orders and noises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg.accel.contexts import Network, open_plan
from arimg.accel.masked import Masked
from arimg.accel.plan import guidance_scales
from arimg.accel.target import Target
from arimg.models.mar import MARTransformer
from tests.parity.checkers.mar_build import Recorded, build_mar, request_of, unpatched
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    model = build_mar(fixture.spec["config"], fixture.state_dict())
    for run in fixture.spec["runs"]:
        check_run(fixture, model, run)


def check_run(fixture: Fixture, model: MARTransformer, run: dict[str, Any]) -> None:
    """Step by step, then by the decoder."""
    tag, labels = run["tag"], run["labels"]
    noise = Recorded(fixture[f"in.{tag}.orders"], recorded_noise(fixture, model, run), {})
    request = request_of(model, None if labels is None else fixture[labels], noise, run["cfg"], run["temperature"],
                         run["num_iter"])
    plan, canvas_BLC = open_plan(model, request)
    network = Network(model, request, plan, run["cfg_schedule"], last_noise=False)
    masks, canvases, scales = [], [], []
    for step in range(plan.steps):
        steps_B1 = torch.full((len(canvas_BLC), 1), step)
        masks.append((~plan.known(steps_B1)[:, 0]).float())
        canvases.append(canvas_BLC.clone())
        drawn = network.draw(canvas_BLC, steps_B1)
        fixture.compare(f"out.{tag}.sampled.{step}", drawn.sample.latents_NC)
        images_N, positions_N = drawn.tokens.images_N, drawn.tokens.positions_N
        canvas_BLC[images_N, positions_N] = drawn.sample.latents_NC
        scales.append(guidance_scales(request, plan, run["cfg_schedule"], images_N, torch.full_like(images_N, step),
                                      positions_N, torch.float64)[0, 0])
    fixture.compare(f"out.{tag}.mask_before", torch.stack(masks))
    fixture.compare(f"out.{tag}.tokens_before", torch.stack(canvases))
    fixture.compare(f"out.{tag}.cfg_iter", torch.stack(scales))
    latents_BLC = Masked(ramp=run["cfg_schedule"]).decode(Target(model, request), request).latents_BLC
    assert latents_BLC is not None
    fixture.compare(f"out.{tag}.latents", unpatched(latents_BLC, model))


def recorded_noise(fixture: Fixture, model: MARTransformer, run: dict[str, Any]) -> Tensor:
    """noise_BLSC. The rows of a step are its tokens, image after image, in ascending position."""
    tag, orders_BL = run["tag"], fixture[f"in.{run['tag']}.orders"]
    noise_BLSC = torch.full((*orders_BL.shape, model.head.draws, model.channels), torch.nan)
    masked = orders_BL.shape[1]
    for step, count in enumerate(run["tokens_per_step"]):
        positions_BT = orders_BL[:, masked - count:masked].sort(dim=1).values
        masked -= count
        images_N = torch.arange(len(orders_BL)).repeat_interleave(count)
        start_NC = fixture[f"in.{tag}.noise_init.{step}"]
        steps_NSC = fixture[f"in.{tag}.noise_steps.{step}"][:, :len(start_NC)].flip(0).transpose(0, 1)
        noise_BLSC[images_N, positions_BT.flatten()] = torch.cat([start_NC[:, None], steps_NSC], dim=1)
    return noise_BLSC
