"""The losses of Distilled Decoding 1 (Liu et al. 2024, arXiv:2412.17153) and 2 (Liu et al. 2025, arXiv:2510.21003) as
functions of tensors: no network, no randomness, nothing detached but what is said to be. Equations (5) to (9) of
docs/distilled.md.

Losses of DD2 are per token, sums over the latent channels. Its notation: q the generator's token, x_t = (1 - t) q +
t eps its noised form, v a velocity, s a score, f = x_t - t v the clean token that a network sees in x_t. The paper
states them in scores; the networks give velocities, and v = -(t s + x) / (1 - t) makes each form a weighted version of
the other.

Letters: B images; L tokens; N tokens (any leading axes); C latent channels; V codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIR_VARIANCE, _PAIR_DISTANCE = 0.2, 0.5       # of pair_loss


def squared_distance(tokens_NC: Tensor, target_NC: Tensor) -> Tensor:
    """|x - y|^2 per token, shape N."""
    return (tokens_NC - target_NC).square().sum(-1)


def student_losses(logits_BLV: Tensor, latents_BLC: Tensor, codes_BL: Tensor, codebook_VC: Tensor, clean_B: Tensor,
                   split: int) -> tuple[Tensor, Tensor]:
    """DD1: (cross entropy in nats per token, |latent - code vector|^2 per token), scalars.

    The first counts noise tokens before `split`, the second those from it on; 0 where there are none. The end of the
    trajectory, codes_BL, is the target from every timestep (section 3.2).
    """
    positions_L = torch.arange(codes_BL.shape[1], device=codes_BL.device)
    noise_BL = positions_L >= clean_B[:, None]
    entropy_BL = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten(), reduction="none").view_as(codes_BL)
    distance_BL = squared_distance(latents_BLC, codebook_VC[codes_BL])
    return _mean(entropy_BL, noise_BL & (positions_L < split)), _mean(distance_BL, noise_BL & (positions_L >= split))


def perceptual_input(latents_BLC: Tensor, codes_BL: Tensor, codebook_VC: Tensor, clean_B: Tensor,
                     split: int) -> Tensor:
    """DD1: latents_BLC of the picture that a perceptual loss sees: the student's own tokens where its latents count,
    the target's code vectors elsewhere."""
    positions_L = torch.arange(codes_BL.shape[1], device=codes_BL.device)
    own_BL = positions_L >= clean_B[:, None].clamp_min(split)
    return torch.where(own_BL[..., None], latents_BLC, codebook_VC[codes_BL].to(latents_BLC.dtype))


def _mean(values_BL: Tensor, counted_BL: Tensor) -> Tensor:
    return (values_BL * counted_BL).sum() / counted_BL.sum().clamp_min(1)


def noised(q_NC: Tensor, t_N1: Tensor, noise_NC: Tensor) -> Tensor:
    """x_t = (1 - t) q + t eps."""
    return (1 - t_N1) * q_NC + t_N1 * noise_NC


def denoised(x_NC: Tensor, t_N1: Tensor, velocity_NC: Tensor) -> Tensor:
    """f = x_t - t v."""
    return x_NC - t_N1 * velocity_NC


def ground_truth_score_loss(velocity_NC: Tensor, teacher_velocity_NC: Tensor) -> Tensor:
    """GTS, first stage: |v - v_teacher|^2 on the teacher's own sequences."""
    return squared_distance(velocity_NC, teacher_velocity_NC)


def fake_score_loss(velocity_NC: Tensor, q_NC: Tensor, noise_NC: Tensor) -> Tensor:
    """FCS, of the guidance network on the generator's tokens: |v - (eps - q)|^2. q is not trained by it."""
    return squared_distance(velocity_NC, noise_NC - q_NC.detach())


def score_distillation_loss(q_NC: Tensor, fake_NC: Tensor, teacher_NC: Tensor, alpha: float = 1.0,
                            weight_N1: Tensor | float = 1.0) -> Tensor:
    """CSD, of the generator, in the form of score identity distillation (Zhou et al. 2024, arXiv:2404.04057):
    w [(1 - alpha) |d|^2 + d . (f_fake - q)] with d = f_teacher - f_fake.

    fake_NC and teacher_NC are `denoised` at x_t, a function of q: gradients go through both networks' inputs, and what
    the guidance network itself knows of earlier tokens must be detached by the caller.

    With alpha = 1 its mean is 0 at the best guidance network of *any* generator: its value measures no progress, and
    |d|^2 does.
    """
    d_NC = teacher_NC - fake_NC
    return (weight_N1 * ((1 - alpha) * d_NC.square() + d_NC * (fake_NC - q_NC))).sum(-1)


def reverse_kl_loss(q_NC: Tensor, fake_NC: Tensor, teacher_NC: Tensor, weight_N1: Tensor | float = 1.0) -> Tensor:
    """The alternative to CSD (distribution matching, Yin et al. 2024, arXiv:2311.18828): a loss whose gradient in q is
    w (f_fake - f_teacher), with no gradient through the networks."""
    return (weight_N1 * (fake_NC - teacher_NC).detach() * q_NC).sum(-1)


def pair_loss(q_BLC: Tensor, codes_BL: Tensor, codebook_VC: Tensor) -> Tensor:
    """Scalar: a generator's tokens q, made of the noise of pairs, against the codes of these. Cross entropy of the code
    in q, taken for a code vector under noise of variance 0.2, and half of |q - c|^2. The distance alone is content with
    the mean of codes that the generator cannot tell apart yet; the cross entropy alone lets q run past c."""
    logits_BLV = (q_BLC @ codebook_VC.T - codebook_VC.square().sum(-1) / 2) / _PAIR_VARIANCE
    entropy = F.cross_entropy(logits_BLV.flatten(0, 1), codes_BL.flatten())
    return entropy + _PAIR_DISTANCE * squared_distance(q_BLC, codebook_VC[codes_BL]).mean()


def sid_weight(q_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """w_N1 = 1 / mean_c |q - f_teacher|, detached: keeps the loss of one size over t (SiD, section 4)."""
    return 1 / (q_NC - teacher_NC).detach().abs().mean(-1, keepdim=True).clamp_min(1e-5)
