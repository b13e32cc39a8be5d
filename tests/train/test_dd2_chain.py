"""Distilled Decoding 2 from end to end on a chain of two tokens, with its real networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from arimg.accel import flow
from arimg.accel.base import DecodeRequest
from arimg.accel.dd2 import ar_diffusion, shifted
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.models.generators import ARGenerator
from arimg.tokenizers.vq import VQSpace
from arimg.train.dd_losses import (denoised, fake_score_loss, ground_truth_score_loss, noised, score_distillation_loss,
                                   sid_weight)
from tests.chi_square import total_variation

CODES, BATCH, GRID = 5, 128, (1, 2)
STEPS, ROUNDS, UPDATES = 1000, 1400, 5        # of the first stage, of the second, of the guidance network in a round
RANDOM = torch.Generator().manual_seed(3)
SPACE = VQSpace(torch.randn(CODES, 2, generator=RANDOM))
FIRST = (1.2 * torch.randn(CODES, generator=RANDOM)).softmax(-1)
SECOND = (1.5 * torch.randn(CODES, CODES, generator=RANDOM)).softmax(-1)
JOINT = FIRST[:, None] * SECOND


def teacher_log_p(q: Tensor) -> Tensor:
    """(B, 2, V): of the second token given the code nearest to the first."""
    return torch.stack([FIRST.expand(len(q), -1), SECOND[SPACE.nearest(q[:, :1])[:, 0]]], dim=1).log()


def conditions(count: int) -> Condition:
    return Condition(class_ids_B=torch.zeros(count, dtype=torch.int64))


def velocity(network: ARGenerator, read: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return network.velocity(x, t, network.features(shifted(read, SPACE), conditions(len(x)), GRID))


def one_step(network: ARGenerator, count: int = BATCH) -> Tensor:
    noise = torch.randn(count, 2, 2, generator=RANDOM)
    tokens: Tensor = network(shifted(noise, SPACE), noise, conditions(count), GRID)
    return tokens


def corruption(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times, noises, noised tokens."""
    t, noise = 0.02 + 0.96 * torch.rand(*q.shape[:2], 1, generator=RANDOM), torch.randn(q.shape, generator=RANDOM)
    return t, noise, noised(q, t, noise)


def update(optimiser: torch.optim.Optimizer, losses: Tensor) -> None:
    optimiser.zero_grad()
    losses.mean().backward()
    optimiser.step()


def tuned() -> ARGenerator:
    """First stage: teacher's sequences, teacher's scores."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ARConfig(vocab_size=CODES, dim=32, layers=1, heads=2, ffn_hidden=64, block_size=4, num_classes=1,
                          rope_prefix="identity", rope_grid="true", token_dropout=0, residual_dropout=0, ffn_dropout=0)
        network = ARGenerator.from_teacher(ARTransformer(config), 2, head_width=64, head_depth=2)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(STEPS):
        pairs = torch.multinomial(JOINT.flatten(), BATCH, replacement=True, generator=RANDOM)
        q = SPACE.codebook_VC[torch.stack([pairs // CODES, pairs % CODES], dim=1)]
        t, _, x = corruption(q)
        teacher = flow.velocity(x, t, teacher_log_p(q), SPACE.codebook_VC)
        update(optimiser, ground_truth_score_loss(velocity(network, q, x, t), teacher))
    return network


def distilled(network: ARGenerator) -> ARGenerator:
    """Second stage: guidance updates (FCS), then one of the generator (CSD)."""
    generator, guidance = copy.deepcopy(network), copy.deepcopy(network)
    g_optimiser = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.99))
    optimiser = torch.optim.Adam(guidance.parameters(), lr=5e-4, betas=(0.0, 0.99))
    for _ in range(ROUNDS):
        for _ in range(UPDATES):
            q = one_step(generator).detach()
            t, noise, x = corruption(q)
            update(optimiser, fake_score_loss(velocity(guidance, q, x, t), q, noise))
        q = one_step(generator)
        t, _, x = corruption(q)
        f_fake = denoised(x, t, velocity(guidance, q.detach(), x, t))
        f_teacher = denoised(x, t, flow.velocity(x, t, teacher_log_p(q.detach()), SPACE.codebook_VC))
        update(g_optimiser, score_distillation_loss(q, f_fake, f_teacher, 1.0, sid_weight(q, f_teacher)))
    return generator


def distance(tokens: Tensor) -> float:
    """TV of the codes of (N, 2, C) tokens from the joint law."""
    codes = SPACE.nearest(tokens)
    return total_variation(torch.bincount(CODES * codes[:, 0] + codes[:, 1], minlength=CODES ** 2), JOINT.flatten())


@pytest.mark.slow
def test_a_one_step_generator_learns_the_joint_law() -> None:
    network, count = tuned(), 10_000
    request = DecodeRequest(conditions(count), GRID, torch.arange(count), space=SPACE)
    noise = torch.randn(count, 2, 2, generator=RANDOM)
    with torch.no_grad():
        sampled = distance(ar_diffusion(network, noise, request, steps=30))
        before = distance(one_step(network, count))
    generator = distilled(network)
    with torch.no_grad():
        after = distance(one_step(generator, count))
    print(f"TV: sampler of the first stage {sampled:.3f}, one step before {before:.3f} and after {after:.3f}")
    assert sampled < 0.1 and before > 0.25 and after < 0.2
