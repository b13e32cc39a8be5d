"""The heads: samplers against diffusers and closed forms, guidance, losses, precision, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.errors import ConfigError
from arimg.models import diffusion_head
from arimg.models.diffusion_head import DiffusionHead, HeadConfig, HeadPass, build_head, guide
from arimg.models.flow_head import FlowHead
from arimg.models.schedule import build_schedule, kept_timesteps
from tests.models.toy_continuous import scrambled


def toy_head(**changes: Any) -> Any:
    """Four channels, conditions of width 8."""
    return scrambled(build_head(HeadConfig(**{"width": 16, "layers": 2, "steps": "ddim10", **changes}), 4, 8), 0)


def toy_inputs(head: Any, rows: int = 5, branches: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(branches, rows, 8, generator=generator, dtype=torch.float64),
            torch.randn(rows, head.draws, head.channels, generator=generator, dtype=torch.float64))


def exact_gaussian(monkeypatch: pytest.MonkeyPatch, std: float) -> None:
    """The network that knows the true epsilon of data N(0, std^2), and its true posterior variance ratio (v = -1)."""
    def run(self: Any, times: list[float], z_GND: Tensor) -> Any:
        bars = [step.alpha_bar for step in build_schedule().steps]
        for time in times:
            bar = bars[int(time)]

            def network(x_NC: Tensor, bar: float = bar) -> Tensor:
                eps = math.sqrt(1 - bar) / (bar * std ** 2 + 1 - bar) * x_NC
                return torch.cat([eps, -torch.ones_like(eps)], dim=-1)[None]
            yield network
    monkeypatch.setattr(diffusion_head.HeadMLP, "run", run)


@pytest.mark.parametrize("steps", ["ddim20", "ddim50"])
def test_ddim_agrees_with_diffusers(steps: str) -> None:
    from diffusers import DDIMScheduler

    head = toy_head(steps=steps, method="ddim")
    z, noise = toy_inputs(head)
    count = len(head.schedule.timesteps)
    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True,
                              timestep_spacing="leading", steps_offset=0)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == list(head.schedule.timesteps[::-1])
    x = noise[:, 0]
    for time in scheduler.timesteps:
        eps = head.net(x, time.expand(len(x)), z[0]).chunk(2, dim=-1)[0]
        x = scheduler.step(eps, int(time), x).prev_sample
    torch.testing.assert_close(head.sample(z, noise).latents_NC, x, rtol=1e-4, atol=1e-4)


def test_fewer_steps_of_second_order_are_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Gaussian data every deterministic sampler ends in a multiple of the noise: std / scale, exactly."""
    exact_gaussian(monkeypatch, 0.7)
    errors = {}
    for method in ("ddim", "dpm++"):
        head = toy_head(steps="ddim20", method=method)
        z, noise = toy_inputs(head)
        bar = head.schedule.steps[-1].alpha_bar
        exact = 0.7 / math.sqrt(bar * 0.49 + 1 - bar) * noise[:, 0]
        errors[method] = float((head.sample(z, noise).latents_NC - exact).abs().max())
    assert errors["dpm++"] < errors["ddim"] / 5 and errors["ddim"] < 0.3, errors


def test_ancestral_samples_have_the_law_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_gaussian(monkeypatch, 1.0)
    head = toy_head(steps="100")
    z, noise = toy_inputs(head, 4000)
    sample = head.sample(z, noise)
    assert abs(float(sample.latents_NC.std()) - 1) < 0.03
    assert abs(float(sample.std_NC[0, 0]) - 0.00624) < 2e-4         # spec: the last step's sigma is 0.00624 .. 0.00643
    assert torch.equal(sample.latents_NC, sample.mean_NC)


def test_last_noise_and_temperature() -> None:
    for head in (toy_head(), toy_head(kind="flow", steps="4")):
        z, noise = toy_inputs(head)
        plain, noisy = (head.sample(z, noise, last_noise=last) for last in (False, True))
        torch.testing.assert_close(noisy.latents_NC, plain.latents_NC + plain.std_NC * noise[:, 1])
        assert not torch.equal(head.sample(z, noise, temperature=0.5).latents_NC, plain.latents_NC)
        if isinstance(head, DiffusionHead):
            changed = noise.clone()
            changed[:, 1:] = 0
            still = [head.sample(z, one, temperature=0.0).latents_NC for one in (noise, changed)]
            assert torch.equal(*still)


def test_samplers_without_noise_have_no_density() -> None:
    head = toy_head(method="ddim")
    assert not head.has_density and float(head.sample(*toy_inputs(head)).std_NC.abs().max()) == 0
    assert toy_head().has_density and not toy_head(kind="flow", steps="4", last_std=0.0).has_density


@pytest.mark.parametrize("kind,steps", [("diffusion", "ddim10"), ("flow", "5")])
def test_guidance_between_branches(kind: str, steps: str) -> None:
    """Scale 1 is the first branch alone, 0 the last one; three branches add up; each row has its own scale."""
    head = toy_head(kind=kind, steps=steps)
    z, noise = toy_inputs(head, branches=2)
    rows = noise.shape[0]
    plain = [head.sample(z[g:g + 1], noise).latents_NC for g in range(2)]
    torch.testing.assert_close(head.sample(z, noise, torch.ones(2, rows)).latents_NC, plain[0])
    mixed = head.sample(z, noise, torch.full((2, rows), 3.0).double()).latents_NC
    scales = torch.full((2, rows), 3.0).double()
    scales[0, 2:] = 1.0
    by_row = head.sample(z, noise, scales).latents_NC
    torch.testing.assert_close(by_row, torch.cat([mixed[:2], plain[0][2:]]))
    if kind == "flow":                                      # the variance of branch 0 does not enter
        torch.testing.assert_close(head.sample(z, noise, torch.zeros(2, rows)).latents_NC, plain[1])
    values = torch.arange(12.0).view(3, 2, 2) ** 2
    weights = torch.tensor([[2.0, 3.0], [0.5, 1.0], [9.0, 9.0]])
    expected = values[2] + weights[1][:, None] * (values[1] - values[2]) + weights[0][:, None] * (values[0] - values[1])
    torch.testing.assert_close(guide(values, weights), expected)


def test_modulations_ahead_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = toy_head()
    z, noise = toy_inputs(head, branches=2)
    scales = torch.full((2, len(noise)), 2.0, dtype=torch.float64)
    ahead = head.sample(z, noise, scales).latents_NC
    monkeypatch.setattr(diffusion_head, "AHEAD_ROWS", 1)
    torch.testing.assert_close(head.sample(z, noise, scales).latents_NC, ahead, rtol=0, atol=1e-12)
    times = torch.full((len(noise),), 300)
    network: HeadPass = next(head.net.run([300], z))
    direct = torch.stack([head.net(noise[:, 0], times, one) for one in z])
    torch.testing.assert_close(network(noise[:, 0]), direct)


def test_flow_head_is_euler_of_its_velocity() -> None:
    head = toy_head(kind="flow", steps="3")
    z, noise = toy_inputs(head)
    x = noise[:, 0]
    for k in range(3):
        x = x + head.net(x, torch.full((len(x),), 1000 * k / 3, dtype=torch.float64), z[0]) / 3
    torch.testing.assert_close(head.sample(z, noise).latents_NC, x, rtol=1e-4, atol=1e-5)


def test_flow_loss_is_that_of_the_velocity() -> None:
    head = toy_head(kind="flow", steps="3")
    z, noise = toy_inputs(head)
    t = torch.linspace(0, 1, len(noise), dtype=torch.float64)
    target = noise[:, 1]
    x = (1 - t[:, None]) * noise[:, 0] + t[:, None] * target
    error = target - noise[:, 0] - head.net(x, 1000 * t, z[0])
    torch.testing.assert_close(head.training_loss(target, z[0], t, noise[:, 0]), error.square().mean(-1))


@pytest.mark.slow
@pytest.mark.parametrize("kind,steps", [("diffusion", "ddim25"), ("flow", "8")])
def test_training_lowers_the_loss_and_fits_two_modes(kind: str, steps: str) -> None:
    """Tokens +-1 by condition: after a few hundred steps samples lie near their own mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head: Any = build_head(HeadConfig(kind=kind, width=32, layers=2, steps=steps), 2, 4)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    modes = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    codes = torch.nn.functional.one_hot(torch.arange(2), 4).float()
    for _ in range(500):
        which = torch.randint(0, 2, (64,), generator=generator)
        target = modes[which] + 0.05 * torch.randn(64, 2, generator=generator)
        loss = head.training_loss(target, codes[which], torch.rand(64, generator=generator),
                                  torch.randn(64, 2, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    which = torch.arange(200) % 2
    with torch.no_grad():
        sample = head.sample(codes[which][None], torch.randn(200, head.draws, 2, generator=generator))
    error = (sample.latents_NC - modes[which]).abs()
    assert float(error.mean()) < 0.35, float(error.mean())
    assert isinstance(head, FlowHead if kind == "flow" else DiffusionHead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variance_arithmetic_stays_in_float32(dtype: torch.dtype) -> None:
    head = toy_head().to(dtype)
    z, noise = toy_inputs(head)
    sample = head.sample(z.to(dtype), noise.float())
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in vars(sample).values())


@pytest.mark.parametrize("respacing", ["1", "0", "ddim999", "ddimx", "1001", "x", "10,", "400,400,400", "-5", "1.5"])
def test_impossible_steps(respacing: str) -> None:
    with pytest.raises(ConfigError) as caught:
        toy_head(steps=respacing)
    assert "\n" not in str(caught.value) and respacing in str(caught.value)


def test_respacings_by_hand() -> None:
    assert kept_timesteps("2") == (0, 999) and kept_timesteps("ddim4") == (0, 250, 500, 750)
    assert kept_timesteps("2,3", 10) == (0, 4, 5, 7, 9) and kept_timesteps("") == tuple(range(1000))


def test_wrong_configs() -> None:
    for changes in ({"kind": "x"}, {"method": "euler"}, {"last_std": -1.0}):
        with pytest.raises(ConfigError):
            HeadConfig(**changes)                                               # type: ignore[arg-type]
    for call in (lambda: toy_head(kind="flow", steps="0"), lambda: toy_head().set_sampler("10", "euler")):
        with pytest.raises(ConfigError):
            call()
