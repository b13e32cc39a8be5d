"""Noise schedules, respacings, and the plans of generation."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from arimg.accel.base import DecodeRequest, Guidance
from arimg.accel.plan import Plan, guidance_scales, tokens_per_step
from arimg.models.base import Condition
from arimg.models.schedule import BETAS, build_schedule
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    for name, betas in BETAS.items():
        fixture.compare(f"out.betas_{name}", torch.tensor(betas(), dtype=torch.float64))
        bars = torch.tensor([step.alpha_bar for step in build_schedule("", name).steps], dtype=torch.float64)
        fixture.compare(f"out.alphas_cumprod_{name}", bars)
    for respacing in fixture.spec["config"]["respacings"]:
        check_respacing(fixture, respacing)
    for run in fixture.spec["config"]["mask_runs"]:
        check_plan(fixture, run)


def check_respacing(fixture: Fixture, respacing: str) -> None:
    """Kept timesteps and the tables of the respaced process."""
    schedule = build_schedule(respacing)
    fixture.compare(f"out.map.{respacing}", torch.tensor(schedule.timesteps))
    tables = {"rbetas": schedule.betas, "plvc": [step.log_posterior for step in schedule.steps],
              "pmc1": [step.mean_of_x0 for step in schedule.steps], "pmc2": [step.mean_of_x for step in schedule.steps]}
    for name, values in tables.items():
        fixture.compare(f"out.{name}.{respacing}", torch.tensor(values, dtype=torch.float64))


def check_plan(fixture: Fixture, run: dict[str, Any]) -> None:
    """Tokens per step, and the guidance scale of each step. The released count of masked tokens after the last step is
    the one that this step overrides."""
    length, key = run["seq_len"], run["key"]
    counts = tokens_per_step(length, run["num_iter"])
    known = [0, *accumulate(counts)]
    fixture.compare(f"out.n_pred.{key}", torch.tensor(counts))
    fixture.compare(f"out.mask_len.{key}", torch.tensor([length - number for number in known[1:-1]] + [1]))
    positions_BL = torch.arange(length)[None]
    plan = Plan(positions_BL, torch.tensor([known]), torch.ones(1, length, dtype=torch.bool),
                torch.tensor([len(counts)]))
    request = DecodeRequest(Condition(class_ids_B=torch.zeros(1, dtype=torch.int64)), (1, length), torch.zeros(1),
                            guidance=Guidance(run["cfg"]))
    steps_N = torch.arange(len(counts))
    scales_GN = guidance_scales(request, plan, "linear", torch.zeros_like(steps_N), steps_N, steps_N, torch.float64)
    fixture.compare(f"out.cfg_linear.{key}", scales_GN[0])
