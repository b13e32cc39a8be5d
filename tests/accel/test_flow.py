"""The flow over a codebook: its score, the law that it pushes noise to, and what its solver must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel import flow
from arimg.accel.flow import FlowNoise, FlowSolver, log_density, nearest, posterior, posterior_mean, score, velocity
from arimg.errors import InputError
from arimg.noise import Purpose
from tests.accel.test_memory import Largest
from tests.chi_square import chi_square_p, sampling_floor, total_variation

P_VALUE = 1e-3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy_law(vocab: int, seed: int = 0) -> Tensor:
    return (1.5 * normal(vocab, seed=seed)).softmax(-1)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_the_score_is_the_gradient_of_the_log_density(unit_norm: bool) -> None:
    codebook, p = normal(12, 4), toy_law(12)
    codebook = F.normalize(codebook, dim=-1) if unit_norm else codebook
    log_p = p.log().masked_fill(p < p.median(), -torch.inf).expand(64, -1)      # half of the codes are filtered
    t = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)[:, None]
    x = ((1 - t) * codebook[:1] + t * normal(64, 4, seed=1)).requires_grad_()
    gradient, = torch.autograd.grad(log_density(x, t, log_p, codebook).sum(), x)
    torch.testing.assert_close(score(x, t, log_p, codebook), gradient, rtol=1e-9, atol=1e-9)
    v = velocity(x, t, log_p, codebook)
    torch.testing.assert_close(v, -(t * gradient + x) / (1 - t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.score_of_velocity(v, x, t), gradient, rtol=1e-9, atol=1e-9)
    direct = log_p - (x[:, None] - (1 - t)[..., None] * codebook).square().sum(-1) / (2 * t ** 2)
    torch.testing.assert_close(posterior(x, t, log_p, codebook), direct.softmax(-1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("vocab,channels", [(6, 2), (16, 4)])
def test_gaussian_noise_flows_into_the_law(vocab: int, channels: int) -> None:
    codebook, p, count = normal(vocab, channels), toy_law(vocab), 20_000
    noise, log_p = normal(count, channels, seed=2), p.log().expand(count, -1)

    def counts(solver: FlowSolver) -> Tensor:
        return torch.bincount(solver.codes(noise, log_p, codebook), minlength=vocab)
    exact = counts(FlowSolver(50))
    assert chi_square_p(exact, p) > P_VALUE
    assert total_variation(exact, p) < 2 * sampling_floor(p, count)
    assert chi_square_p(counts(FlowSolver(10, "euler")), p) < 1e-40, "ten Euler steps are known to be biased"


@pytest.mark.parametrize("vocab", [8, 40])          # among many codes each token keeps its own
def test_filtered_codes_are_never_reached(vocab: int) -> None:
    codebook, p = normal(vocab, 3), toy_law(vocab)
    kept = torch.tensor([1, 4, 6])
    filtered = torch.zeros(vocab, dtype=torch.float64).index_copy(0, kept, p[kept] / p[kept].sum())
    codes = FlowSolver(30).codes(normal(5_000, 3, seed=3), filtered.log().expand(5_000, -1), codebook)
    assert set(codes.tolist()) == {1, 4, 6}
    assert chi_square_p(torch.bincount(codes, minlength=vocab), filtered) > P_VALUE


def test_a_chain_of_two_tokens_has_the_joint_law() -> None:
    codebook, first, count = normal(5, 2), toy_law(5), 10_000
    second = torch.stack([toy_law(5, seed) for seed in range(1, 6)])
    noise, solver = normal(count, 2, 2, seed=4), FlowSolver(50)
    a = solver.codes(noise[:, 0], first.log().expand(count, -1), codebook)
    b = solver.codes(noise[:, 1], second.log()[a], codebook)
    joint = first[:, None] * second
    assert chi_square_p(torch.bincount(5 * a + b, minlength=25), joint) > P_VALUE
    shuffled = solver.codes(noise[:, 1], second.log()[a.roll(1)], codebook)
    assert chi_square_p(torch.bincount(5 * a + shuffled, minlength=25), joint) < 1e-9, "the condition does not matter"


def test_euler_converges_at_first_order() -> None:
    codebook, p, count = normal(12, 4), toy_law(12), 4_000
    noise, log_p = normal(count, 4, seed=5), p.log().expand(count, -1)
    reference = FlowSolver(400).codes(noise, log_p, codebook)
    wrong = [float((FlowSolver(steps, "euler").codes(noise, log_p, codebook) != reference).double().mean())
             for steps in (10, 20, 40)]
    assert 0.3 < wrong[1] / wrong[0] < 0.75 and 0.3 < wrong[2] / wrong[1] < 0.75, wrong
    assert float((FlowSolver(20).codes(noise, log_p, codebook) != reference).double().mean()) < 0.01


def test_certainty_and_symmetry() -> None:
    codebook, noise = normal(8, 3), normal(500, 3, seed=6)
    certain = torch.full((500, 8), -torch.inf, dtype=torch.float64)
    certain[:, 5] = 0
    assert bool((FlowSolver().codes(noise, certain, codebook) == 5).all())
    corners = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    codes = FlowSolver().codes(noise[:, :2], torch.full((500, 4), 0.25, dtype=torch.float64).log(), corners)
    assert torch.equal(codes, nearest(noise[:, :2], corners)), "equal codes share the plane by distance"


def test_float32_agrees_with_float64() -> None:
    codebook, count = F.normalize(normal(4096, 8), dim=-1), 100
    log_p = (2 * normal(count, 4096, seed=7)).log_softmax(-1)
    noise = normal(count, 8, seed=8)
    wide = FlowSolver(20).codes(noise, log_p, codebook)
    narrow = FlowSolver(20).codes(noise.float(), log_p.float(), codebook.float())
    assert (wide == narrow).double().mean() >= 0.99
    t = torch.full((count, 1), 1e-3)
    x = (1 - t) * codebook[wide].float() + t * noise.float()
    mean = posterior_mean(x, t, log_p.float(), codebook.float())
    assert bool(mean.isfinite().all()) and (nearest(mean, codebook.float()) == wide).double().mean() >= 0.99


def test_a_code_depends_on_its_own_noise_and_law_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, noise = normal(12, 4), normal(40, 4, seed=9)
    log_p = torch.stack([toy_law(12, seed).log() for seed in range(40)])
    together = FlowSolver(30).codes(noise, log_p, codebook)
    alone = [int(FlowSolver(30).codes(noise[k:k + 1], log_p[k:k + 1], codebook)) for k in range(40)]
    assert together.tolist() == alone
    t, x = torch.full((40, 1), 0.4).double(), noise.clone().requires_grad_()
    whole = velocity(x, t, log_p, codebook)
    gradient, = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(flow, "_ENTRIES", 36)               # three tokens at a time
    assert torch.equal(FlowSolver(30).codes(noise, log_p, codebook), together)
    chunked = velocity(x, t, log_p, codebook)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked.sum(), x)[0], gradient)


@pytest.mark.parametrize("reached", [16384, 2000])
def test_memory_does_not_grow_with_the_tokens(reached: int) -> None:
    """At LlamaGen's codebook: no tensor beyond the laws themselves, which are given, is of all tokens."""
    codebook, count = F.normalize(normal(16384, 8), dim=-1).float(), 2048
    log_p = torch.full((count, 16384), -torch.inf)
    log_p[:, :reached] = -math.log(reached)
    with Largest() as largest:
        codes = FlowSolver(2).codes(normal(count, 8, seed=10).float(), log_p, codebook)
    assert int(codes.max()) < reached and largest.bytes < 1.2 * 4 * flow._ENTRIES < log_p.nbytes / 6


def test_flow_noise_draws_codes_by_the_flow_and_the_rest_as_ever() -> None:
    noise = FlowNoise(codebook_VC=normal(6, 2).float(), solver=FlowSolver(40))
    seeds, positions = torch.arange(5_000), torch.zeros(5_000, 1, dtype=torch.int64)
    p = toy_law(6).float()
    codes = noise.categorical(p.expand(5_000, 1, -1), seeds, positions)
    assert chi_square_p(torch.bincount(codes.flatten(), minlength=6), p.double()) > P_VALUE
    again = noise.categorical(p.expand(5, 1, -1), seeds[7:12], positions[7:12])
    assert torch.equal(again, codes[7:12])
    plain = super(FlowNoise, noise).categorical(p.expand(9, 1, -1), seeds[:9], positions[:9], Purpose.RESIDUAL, 3)
    assert torch.equal(noise.categorical(p.expand(9, 1, -1), seeds[:9], positions[:9], Purpose.RESIDUAL, 3), plain)


@pytest.mark.parametrize("options", [{"steps": 0}, {"method": "rk4"}])
def test_solver_options(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="flow solver"):
        FlowSolver(**options)       # type: ignore[arg-type]
