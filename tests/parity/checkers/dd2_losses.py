"""DD2's losses and their gradients, in float64 throughout."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from arimg.accel import flow
from arimg.models.diffusion_head import HeadMLP
from arimg.train.dd_losses import (denoised, fake_score_loss, ground_truth_score_loss, noised, reverse_kl_loss,
                                   score_distillation_loss, squared_distance)
from tests.parity.checkers.var_sampling_filter import number
from tests.parity.fixture import Fixture

DISTILLATION = re.compile(r"out\.(sid_(score_)?alpha([0-9p]+))_loss")      # alpha1p2 is 1.2


def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    head, features_NZ = build(fixture), fixture["in.features"].double()
    p_NV = fixture["in.probs"].double()
    law = ((p_NV / p_NV.sum(-1, keepdim=True)).log(), fixture["in.codebook"].double())
    q_NC, t_N1, noise_NC = (fixture[f"in.{name}"].double() for name in ("x_gen", "t", "noise"))
    q_NC.requires_grad_()

    def fake(x_NC: Tensor, t_N1: Tensor) -> Tensor:
        return head(x_NC, fixture.spec["config"]["time_embedding_scale"] * t_N1[..., 0], features_NZ)

    x_NC = noised(q_NC, t_N1, noise_NC)
    v_fake_NC, v_teacher_NC = fake(x_NC, t_N1), flow.velocity(x_NC, t_N1, *law)
    s_fake_NC, s_teacher_NC = (flow.score_of_velocity(v_NC, x_NC, t_N1) for v_NC in (v_fake_NC, v_teacher_NC))
    f_fake_NC, f_teacher_NC = (denoised(x_NC, t_N1, v_NC) for v_NC in (v_fake_NC, v_teacher_NC))
    fake_losses_N = fake_score_loss(v_fake_NC, q_NC, noise_NC)
    kl_losses_N = reverse_kl_loss(q_NC, f_fake_NC, f_teacher_NC)
    got = {
        "x_t": x_NC, "v_fake": v_fake_NC, "v_teacher": v_teacher_NC, "s_fake": s_fake_NC, "s_teacher": s_teacher_NC,
        "x0_fake": f_fake_NC, "x0_teacher": f_teacher_NC, "fcs_velocity_loss": fake_losses_N,
        "gts_velocity_loss": ground_truth_score_loss(v_fake_NC, v_teacher_NC),
        "gts_score_loss": squared_distance(s_fake_NC, s_teacher_NC),
        "fcs_score_loss": squared_distance(s_fake_NC, -noise_NC / t_N1),
        "dmd_grad": torch.autograd.grad(kl_losses_N.sum(), q_NC, retain_graph=True)[0],
        "fcs_grad_input_proj": torch.autograd.grad(fake_losses_N.mean(), head.input_proj.weight, retain_graph=True)[0],
    }
    times = list(zip(fixture["in.t_multi"].double(), fixture["in.noise_multi"].double()))
    got["fcs_multi_loss"] = torch.stack([fake_score_loss(fake(noised(q_NC, t, noise), t), q_NC, noise)
                                         for t, noise in times]).mean(0)
    in_scores_N1 = ((1 - t_N1) / t_N1 ** 2) ** 2
    for match in filter(None, map(DISTILLATION.fullmatch, fixture.outputs())):
        run, space, alpha = match.groups()
        loss_N = score_distillation_loss(q_NC, f_fake_NC, f_teacher_NC, number(alpha), in_scores_N1 if space else 1.0)
        got[f"{run}_loss"] = loss_N
        got[f"{run}_grad"] = torch.autograd.grad(loss_N.sum(), q_NC, retain_graph=True)[0]
    for name, tensor in got.items():
        if f"out.{name}" in fixture:
            fixture.compare(f"out.{name}", tensor)


def build(fixture: Fixture) -> HeadMLP:
    """The fake head, in float64."""
    config = fixture.spec["config"]
    head = HeadMLP(config["C"], config["C"], config["width"], config["depth"], config["z"])
    head.load_state_dict(fixture.state_dict("head."))
    return head.double().eval()
