"""Speculative decoding of continuous tokens keeps the law of plain decoding, for every draft; and what breaks it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel import continuous
from arimg.accel.base import Guidance
from arimg.accel.continuous import Cspd, JacobiContinuous, SpeculativeRun
from arimg.accel.gaussians import Gaussian, Residual, log_ratio, overlap, reflected, residual
from arimg.accel.masked import ArContinuous, Masked
from arimg.accel.plan import tokens_per_step
from arimg.accel.relaxed import CspdRelaxed, relaxed_result
from arimg.accel.target import Target
from arimg.noise import CounterNoise, Purpose
from tests.exactness.linear import Chain, ChainHead, LinearCausal, LinearMasked, Setup, chain, linear_law
from tests.exactness.statistics import ks_normal, ks_two, mmd, moment_errors

LIMIT = 1e-3
COUNT = 50_000
COEF, SHIFT, STD = [0.7, 0.8, 0.9, 0.6], [0.1, -0.2, 0.3, 0.05], [0.5, 0.4, 0.3, 0.25]
TARGET = chain(COEF, SHIFT, STD)
DRAFTS = {
    "shifted": chain(COEF, [0.2, -0.3, 0.35, 0.15], STD),
    "wider": chain(COEF, [0.2, -0.3, 0.35, 0.15], [0.4, 0.5, 0.2, 0.4]),
    "narrower": chain(COEF, SHIFT, [0.5, 0.4, 0.3, 0.15]),
}
WEIGHTS = torch.tensor([[0, 0, 0, 0], [0.8, 0, 0, 0], [-0.5, 0.6, 0, 0], [0.3, 0.2, 0.7, 0]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.4, 0.2, 0.5], dtype=torch.float64)
LONG = 10                       # tokens: more than the widest window


def one_token(law: Chain) -> LinearCausal:
    zero = torch.zeros(1, dtype=torch.float64)
    return LinearCausal(ChainHead(law), zero[None], zero)


def four_tokens(law: Chain = TARGET, weights: Tensor = WEIGHTS, effect: float = 0.0) -> LinearCausal:
    return LinearCausal(ChainHead(law), weights, BIAS, effect)


def run(decoder: Any, network: Any, setup: Setup) -> tuple[Tensor, Any]:
    """(tokens_BL, stats)."""
    request = setup.request()
    result = decoder.decode(Target(network, request), request)
    assert result.latents_BLC is not None
    return result.latents_BLC[..., 0], result.stats


# ---------------------------------------------------------------------------------------------------------------------
# One token


@pytest.mark.parametrize("count", [COUNT, pytest.param(4 * COUNT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_one_token_has_the_law_of_the_target(name: str, temperature: float, count: int) -> None:
    tokens, _ = run(Cspd(one_token(DRAFTS[name])), one_token(TARGET), Setup(count, temperature=temperature))
    assert ks_normal(tokens[:, 0], *TARGET.law(temperature)) > LIMIT


def test_acceptance_is_the_overlap() -> None:
    """Aligned noise: the means of the last step differ by a constant."""
    draft, gap = DRAFTS["shifted"], 0.0
    for coef, ours, theirs in zip(COEF, TARGET.shift_S.tolist(), draft.shift_S.tolist()):
        gap = coef * gap + ours - theirs
    expected = math.erfc(abs(gap) / (2 * STD[-1]) / math.sqrt(2))
    _, stats = run(Cspd(one_token(draft)), one_token(TARGET), Setup(COUNT))
    assert abs(stats.extra["acceptance"] - expected) < 4 * math.sqrt(expected * (1 - expected) / COUNT)
    law = Gaussian(torch.zeros(1, 1), torch.full((1, 1), STD[-1]))
    other = Gaussian(torch.full((1, 1), gap), law.std_NC)
    assert math.isclose(float(overlap(law, other)), expected, rel_tol=1e-6)


def test_independent_noise_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared noise only makes drafts better: with other noise for the draft, the law stays and acceptance falls."""
    draft, target = one_token(DRAFTS["shifted"]), one_token(TARGET)
    plain_sample = draft.head.sample

    def sample(z_GND: Tensor, noise_NSC: Tensor, *rest: Any, **named: Any) -> Any:
        return plain_sample(z_GND, torch.cat([-noise_NSC.roll(1, 0)[:, :1], noise_NSC.roll(1, 0)[:, 1:]], dim=1), *rest,
                            **named)
    _, aligned = run(Cspd(one_token(DRAFTS["shifted"])), target, Setup(COUNT))
    monkeypatch.setattr(draft.head, "sample", sample)
    tokens, apart = run(Cspd(draft), target, Setup(COUNT))
    assert ks_normal(tokens[:, 0], *TARGET.law()) > LIMIT
    assert apart.extra["acceptance"] < aligned.extra["acceptance"] - 0.05


# ---------------------------------------------------------------------------------------------------------------------
# What must fail the same test


def with_factor(sign: int) -> Callable[..., Tensor]:
    """The trajectory factor of these two chains in the acceptance rule: as printed (+) or inverted, as released (-)."""
    def rule(x_NC: Tensor, p: Gaussian, q: Gaussian, uniform_N: Tensor) -> Tensor:
        factor = (DRAFTS["wider"].std_S[:-1].log() - TARGET.std_S[:-1].log()).sum()
        return uniform_N.double().log() <= log_ratio(x_NC, p, q) + sign * factor
    return rule


def soft_distance(x_NC: Tensor, p: Gaussian, q: Gaussian, uniform_N: Tensor) -> Tensor:
    """Inner temperature 42."""
    z_p, z_q = ((x_NC - law.mean_NC) / law.std_NC / 42 for law in (p, q))
    ratio = (z_q.square() / 2 + q.std_NC.log() - z_p.square() / 2 - p.std_NC.log()).sum(-1)
    return uniform_N.double().log() <= ratio


def plain_redraw(x_NC: Tensor, p: Gaussian, q: Gaussian, seeds_N: Tensor, positions_N: Tensor,
                 noise: CounterNoise) -> Residual:
    """A draw of the target in place of the residual."""
    normal = noise.normal(seeds_N, positions_N[:, None], x_NC.shape[1], Purpose.RESIDUAL)[:, 0]
    return Residual(p.mean_NC + p.std_NC * normal, torch.ones_like(positions_N))


def capped(x_NC: Tensor, p: Gaussian, q: Gaussian, seeds_N: Tensor, positions_N: Tensor,
           noise: CounterNoise) -> Residual:
    """100 proposals, as released with a factor of 0.5, and zero where all fail."""
    def proposals() -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(100):
            normal_NC = noise.normal(seeds_N, positions_N[:, None], 1, Purpose.RESIDUAL, 2 * k)[:, 0]
            yield normal_NC, noise.uniform(seeds_N, positions_N[:, None], 1, Purpose.RESIDUAL, 2 * k + 1)[:, 0, 0]
    none_N, log_factor_N = torch.zeros(len(x_NC), dtype=torch.bool), torch.full((len(x_NC),), math.log(0.5))
    replaced_NC, _ = relaxed_result(x_NC, none_N, p, q, log_factor_N, proposals())
    return Residual(replaced_NC, torch.ones_like(positions_N))


MUTANTS: dict[str, tuple[str, Any]] = {
    "factor as printed": ("accepted", with_factor(1)),
    "factor inverted": ("accepted", with_factor(-1)),
    "inner temperature 42": ("accepted", soft_distance),
    "always kept": ("accepted", lambda x_NC, p, q, uniform_N: torch.ones_like(uniform_N, dtype=torch.bool)),
    "redraw of the target": ("recoupled", plain_redraw),
    "cap of 100, with zeros": ("recoupled", capped),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_test_finds_wrong_rules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, *MUTANTS[name])
    tokens, _ = run(Cspd(one_token(DRAFTS["wider"])), one_token(TARGET), Setup(COUNT))
    assert ks_normal(tokens[:, 0], *TARGET.law()) < LIMIT


def test_the_law_test_finds_drafts_without_last_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = one_token(DRAFTS["wider"])
    sample = draft.head.sample
    monkeypatch.setattr(draft.head, "sample", lambda z, noise, scales, temperature, _: sample(z, noise, scales,
                                                                                              temperature, False))
    tokens, _ = run(Cspd(draft), one_token(TARGET), Setup(COUNT))
    assert ks_normal(tokens[:, 0], *TARGET.law()) < LIMIT


def test_the_relaxed_decoder_fails() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    weights = torch.zeros(2, 2, dtype=torch.float64)
    target = LinearMasked(ChainHead(TARGET), weights, zero)
    decoder = CspdRelaxed(LinearMasked(ChainHead(DRAFTS["wider"]), weights, zero), window=1, prefill=0.0)
    tokens, stats = run(decoder, target, Setup(20_000, 2, steps=2))
    last = tokens[:, 1].clone()
    plain, _ = run(Masked(), target, Setup(20_000, 2, steps=2, seed=5))
    assert stats.extra["judged"] > 0
    assert ks_two(last, plain[:, 1]) < LIMIT
    assert mmd(tokens[:2000], plain[:2000]) < LIMIT


def test_a_good_draft_is_blanked_by_the_released_residual() -> None:
    """Equal Gaussians and a factor of 0.5: half of the tokens are rejected, and no proposal can ever be kept."""
    count, noise = 2000, CounterNoise()
    law = Gaussian(torch.zeros(count, 1), torch.ones(count, 1))
    seeds, positions = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    x_NC = noise.normal(seeds, positions[:, None], 1, Purpose.SAMPLE)[:, 0]
    kept_N = noise.uniform(seeds, positions[:, None], 1, Purpose.ACCEPT)[:, 0, 0] < 0.5
    assert torch.equal(capped(x_NC, law, law, seeds, positions, noise).x_NC, torch.zeros_like(x_NC))
    drawn = residual(law, Gaussian(law.mean_NC, 1.001 * law.std_NC), seeds[~kept_N][:20], positions[:20], noise)
    assert drawn.x_NC.isfinite().all() and drawn.tries_N.max() > 100, "ours goes on until one is kept"


# ---------------------------------------------------------------------------------------------------------------------
# Several tokens


def test_two_tokens_keep_their_correlation() -> None:
    """Spec: 0.80 in the target; 0.54 without rollback, 0 when token 2 is verified without token 1."""
    weights = torch.tensor([[0.0, 0.0], [4 / 3, 0.0]], dtype=torch.float64)       # correlation 0.8
    target, draft = (LinearCausal(ChainHead(law), one, torch.zeros(2, dtype=torch.float64))
                     for law, one in ((TARGET, weights), (DRAFTS["wider"], 0.5 * weights)))
    tokens, _ = run(Cspd(draft, 2), target, Setup(20_000, 2))
    assert moment_errors(tokens, *linear_law(weights, torch.zeros(2, dtype=torch.float64), *TARGET.law())) < 4
    assert abs(float(torch.corrcoef(tokens.T)[0, 1]) - 0.8) < 0.01


@pytest.mark.parametrize("window", [1, 3, 4, 8, "auto", *(pytest.param(slow, marks=pytest.mark.slow)
                                                          for slow in (2, 5, 6, 7))])
def test_every_window_keeps_the_law_of_the_target(window: int | str) -> None:
    """Of tokens that depend on the two before them and on the first."""
    place = torch.arange(LONG)
    back = place[:, None] - place
    weights = torch.where(back == 1, 0.6, torch.where(back == 2, -0.3, 0.0)).double()
    weights[3:, 0] += 0.2
    bias = 0.1 * place.double() - 0.4
    draft = LinearCausal(ChainHead(DRAFTS["wider"]), 0.7 * weights, bias)
    tokens, _ = run(Cspd(draft, window), LinearCausal(ChainHead(TARGET), weights, bias), Setup(20_000, LONG))
    assert moment_errors(tokens, *linear_law(weights, bias, *TARGET.law())) < 4


@pytest.mark.parametrize("prefill", [0.05, 0.5, 1.0])
def test_prefill_keeps_the_law(prefill: float) -> None:
    draft = four_tokens(DRAFTS["wider"], 0.7 * WEIGHTS)
    tokens, _ = run(Cspd(draft, 3, prefill), four_tokens(), Setup(20_000, 4))
    assert moment_errors(tokens, *linear_law(WEIGHTS, BIAS, *TARGET.law())) < 4


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_mmd_of_speculative_and_plain_tokens(count: int) -> None:
    draft = four_tokens(DRAFTS["wider"], 0.7 * WEIGHTS)
    plain, _ = run(ArContinuous(last_noise=True), four_tokens(), Setup(count, 4, seed=1))
    tokens, _ = run(Cspd(draft, 3), four_tokens(), Setup(count, 4))
    assert mmd(tokens, plain) > LIMIT
    wrong, _ = run(ArContinuous(last_noise=True), four_tokens(weights=0.5 * WEIGHTS), Setup(count, 4))
    assert mmd(wrong, plain) < LIMIT


def test_without_rollback_the_law_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: steps behind a rejection stay."""
    original = SpeculativeRun._judge

    def keep_all(self: SpeculativeRun, drawn: Any, lengths_B: Tensor) -> Tensor:
        canvas = self.canvas_BLC.clone()
        original(self, drawn, lengths_B)
        judged = self.canvas_BLC.clone()
        self.canvas_BLC.copy_(torch.where(judged != canvas, judged, canvas))
        return lengths_B - 1
    monkeypatch.setattr(SpeculativeRun, "_judge", keep_all)
    draft = four_tokens(DRAFTS["wider"], 0.7 * WEIGHTS)
    tokens, _ = run(Cspd(draft, 4), four_tokens(), Setup(20_000, 4))
    assert moment_errors(tokens, *linear_law(WEIGHTS, BIAS, *TARGET.law())) > 6


@pytest.mark.parametrize("steps", [4, 2])
def test_masked_networks_keep_their_law(steps: int) -> None:
    """Random order, one or several tokens per step, one context per drafted step."""
    target, draft = (LinearMasked(ChainHead(law), weights, BIAS) for law, weights in
                     ((TARGET, WEIGHTS + 0.3), (DRAFTS["wider"], WEIGHTS)))
    tokens, stats = run(Cspd(draft, 2), target, Setup(5000, 4, steps=steps))
    plain, _ = run(Masked(last_noise=True), target, Setup(5000, 4, steps=steps, seed=3))
    for position in range(4):
        assert ks_two(tokens[:, position], plain[:, position]) > LIMIT / 4
    assert mmd(tokens[:400], plain[:400]) > LIMIT
    assert 0 < stats.extra["acceptance"] < 1


@pytest.mark.parametrize("cfg", [0.0, 3.0])
@pytest.mark.parametrize("ramp", ["linear", "constant"])
def test_every_position_has_its_own_guidance(ramp: Any, cfg: float) -> None:
    """Guided z = bias + effect * scale (class 1 against class 0); linear: scale 1 + (cfg - 1) min(j+1, L-1) / L."""
    target, draft = four_tokens(effect=0.4), four_tokens(DRAFTS["wider"], 0.7 * WEIGHTS, effect=0.2)
    tokens, _ = run(Cspd(draft, 3, ramp=ramp), target, Setup(20_000, 4, guidance=Guidance(cfg)))
    shares = torch.tensor([min(j + 1, 3) / 4 for j in range(4)]) if ramp == "linear" else torch.ones(4)
    bias = BIAS + 0.4 * (1 + (cfg - 1) * shares.double())
    assert moment_errors(tokens, *linear_law(WEIGHTS, bias, *TARGET.law())) < 4


def test_guidance_outside_the_interval_is_off() -> None:
    tokens, _ = run(ArContinuous("constant", last_noise=True), four_tokens(effect=0.4),
                    Setup(20_000, 4, guidance=Guidance(3.0, interval=(1, 3))))
    bias = BIAS + 0.4 * torch.tensor([1, 3, 3, 1], dtype=torch.float64)
    assert moment_errors(tokens, *linear_law(WEIGHTS, bias, *TARGET.law())) < 4


# ---------------------------------------------------------------------------------------------------------------------
# Draft = target, accounting, couplings, plans


@pytest.mark.parametrize("masked", [False, True])
def test_a_draft_that_is_the_target_is_always_kept(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = LinearMasked(ChainHead(TARGET), WEIGHTS + 0.3, BIAS) if masked else four_tokens()
    plain: Any = Masked(last_noise=True) if masked else ArContinuous(last_noise=True)
    drafted: list[Tensor] = []
    judge = SpeculativeRun._judge

    def watch(self: SpeculativeRun, drawn: Any, lengths_B: Tensor) -> Tensor:
        before = self.canvas_BLC.clone()
        stop_B = judge(self, drawn, lengths_B)
        kept = drawn.tokens.offsets_N < lengths_B[drawn.tokens.images_N]
        where = (drawn.tokens.images_N[kept], drawn.tokens.positions_N[kept])
        assert torch.equal(self.canvas_BLC[where], before[where])
        drafted.append(before)
        return stop_B
    monkeypatch.setattr(SpeculativeRun, "_judge", watch)
    setup = Setup(50, 4, steps=4 if masked else None)
    tokens, stats = run(Cspd(network, 3), network, setup)
    assert stats.extra["acceptance"] == 1 and stats.extra["rejected"] == stats.extra["tries"] == 0 and drafted
    torch.testing.assert_close(tokens, run(plain, network, setup)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_costs_are_those_of_the_formula(masked: bool, window: int) -> None:
    """All kept: rounds of W drafted steps and a free one, where steps are left; passes and head tokens follow."""
    network: Any = LinearMasked(ChainHead(TARGET), WEIGHTS + 0.3, BIAS) if masked else four_tokens()
    _, stats = run(Cspd(network, window), network, Setup(10, 4, steps=4 if masked else None))
    rounds = math.ceil(4 / (window + 1))
    drafted = 4 - 4 // (window + 1)             # each whole round has a free step
    assert stats.forward_passes == rounds
    assert stats.extra["draft_passes"] == drafted
    assert stats.extra["draft_head_tokens"] == stats.extra["judged"] == 10 * drafted
    assert stats.extra["head_tokens"] == 10 * 4
    assert sum(stats.accepted_per_pass) == 4


def test_a_sample_does_not_depend_on_its_batch() -> None:
    draft = four_tokens(DRAFTS["wider"], 0.7 * WEIGHTS)
    masked = [LinearMasked(ChainHead(law), weights, BIAS) for law, weights in
              ((TARGET, WEIGHTS + 0.3), (DRAFTS["wider"], WEIGHTS))]
    for decoder, network, steps in ((Cspd(draft, 3), four_tokens(), None), (Cspd(draft, "auto"), four_tokens(), None),
                                    (Cspd(masked[1], 2), masked[0], 3), (CspdRelaxed(masked[1], 1), masked[0], 3),
                                    (JacobiContinuous(3), four_tokens(), None), (Masked(), masked[0], 3)):
        together, _ = run(decoder, network, Setup(8, 4, steps=steps))
        for j in range(8):
            options = {"options": {}}
            setup = Setup(1, 4, steps=steps, **options)
            request = setup.request()
            object.__setattr__(request, "seeds_B", torch.tensor([j]))
            alone = decoder.decode(Target(network, request), request).latents_BLC
            torch.testing.assert_close(alone[0, :, 0], together[j], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 4, 7])
def test_jacobi_gives_plain_tokens(window: int) -> None:
    for network, plain, steps in ((four_tokens(), ArContinuous(), None),
                                  (LinearMasked(ChainHead(TARGET), WEIGHTS + 0.3, BIAS), Masked(), 3)):
        setup = Setup(50, 4, steps=steps)
        tokens, stats = run(JacobiContinuous(window, tolerance=0.0), network, setup)
        torch.testing.assert_close(tokens, run(plain, network, setup)[0], rtol=0, atol=1e-12)
        assert stats.forward_passes <= 4


def test_residual_draws_follow_the_normalised_difference() -> None:
    """Chi-square over 50 bins against max(0, p - q), integrated numerically."""
    count, p, q = 20_000, (0.0, 1.0), (0.5, 1.3)
    laws = [Gaussian(*(torch.full((count, 1), value, dtype=torch.float64) for value in law)) for law in (p, q)]
    drawn = residual(laws[0], laws[1], torch.arange(count), torch.zeros(count, dtype=torch.int64), CounterNoise())
    grid = torch.linspace(-6, 6, 120_001, dtype=torch.float64)[:, None]
    density = [torch.exp(-((grid - mean) / std) ** 2 / 2)[:, 0] / std for mean, std in (p, q)]
    cdf = (density[0] - density[1]).clamp_min(0).cumsum(0)
    ranks = torch.searchsorted(grid[:, 0].contiguous(), drawn.x_NC[:, 0].contiguous()).clamp(max=len(grid) - 1)
    counts = torch.histc((cdf / cdf[-1])[ranks], 50, 0, 1)
    chi = float(((counts - count / 50) ** 2 / (count / 50)).sum())
    assert chi < 49 + 4 * math.sqrt(2 * 49), chi
    total = 1 - float(torch.minimum(*(one / one.sum() for one in density)).sum())
    assert abs(float(drawn.tries_N.double().mean()) * total - 1) < 0.05      # 1 / P(kept)


def test_reflection_is_a_maximal_coupling() -> None:
    """Kept drafts and reflections together follow p, in any direction."""
    generator = torch.Generator().manual_seed(0)
    count, channels = 50_000, 3
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).expand(count, -1)
    q = Gaussian(torch.zeros(count, channels, dtype=torch.float64), std)
    p = Gaussian(torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64).expand(count, -1), std)
    x = std * torch.randn(count, channels, dtype=torch.float64, generator=generator)
    kept = torch.rand(count, dtype=torch.float64, generator=generator).log() <= log_ratio(x, p, q)
    y = torch.where(kept[:, None], x, reflected(x, p, q))
    assert abs(float(kept.double().mean()) - float(overlap(p, q)[0])) < 0.01
    for c in range(channels):
        assert ks_normal(y[:, c], float(p.mean_NC[0, c]), float(std[0, c]) ** 2) > LIMIT
    assert moment_errors(y, p.mean_NC[0], torch.diag(std[0] ** 2)) < 4


@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("gap", [1e-6, 0.01, 0.8])
def test_residuals_are_finite_at_small_scales(channels: int, gap: float) -> None:
    """Standard deviation 0.0063, as in trained heads: densities around 1e35 per token."""
    count = 20
    std = torch.full((count, channels), 0.0063)
    p, q = Gaussian(torch.zeros(count, channels), std), Gaussian(torch.full((count, channels), gap), 1.01 * std)
    seeds, positions = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    assert log_ratio(q.mean_NC, p, q).isfinite().all()
    assert residual(p, q, seeds, positions, CounterNoise()).x_NC.isfinite().all()


@pytest.mark.parametrize("free", [0, 1, 7, 16, 256])
@pytest.mark.parametrize("steps", [1, 2, 13, 64, 256, 1000])
def test_plans_predict_every_token_once(free: int, steps: int) -> None:
    counts = tokens_per_step(free, steps)
    assert sum(counts) == free and len(counts) == min(steps, free) and all(count >= 1 for count in counts)
    if steps >= free:
        assert counts == [1] * free
