"""Decoders of continuous tokens on toy networks: control, given tokens, guidance branches, precision, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from arimg.accel.base import Guidance, Sampling
from arimg.accel.continuous import Cspd, JacobiContinuous, SpeculativeRun
from arimg.accel.masked import ArContinuous, Masked
from arimg.accel.plan import branches_of
from arimg.accel.relaxed import CspdRelaxed
from arimg.accel.target import Target
from arimg.errors import InputError
from tests.models.toy_continuous import HEAD, SIDE, nearby, one_of, toy_causal, toy_inject, toy_mar, toy_request
from tests.toy import toy_pipeline

LENGTH = SIDE ** 2
FLOW = replace(HEAD, kind="flow", steps="3", last_std=0.1)
CAUSAL, MASKED, FLOWING = toy_causal(), toy_mar(), toy_causal(0, FLOW)
DECODERS: dict[str, tuple[Any, Any]] = {        # decoder, network
    "masked": (Masked(), MASKED),
    "ar-continuous": (ArContinuous(), CAUSAL),
    "cspd causal": (Cspd(nearby(CAUSAL), 3), CAUSAL),
    "cspd masked": (Cspd(nearby(MASKED), 2), MASKED),
    "cspd auto": (Cspd(nearby(CAUSAL), "auto"), CAUSAL),
    "cspd flow": (Cspd(nearby(FLOWING), 3), FLOWING),
    "cspd-relaxed": (CspdRelaxed(toy_mar(1), 2, tries=5), MASKED),
    "jacobi causal": (JacobiContinuous(4, 1e-6), CAUSAL),
    "jacobi masked": (JacobiContinuous(3, 1e-6), MASKED),
}


def run(name: str, request: Any) -> Any:
    decoder, network = DECODERS[name]
    request = replace(request, steps=6 if "masked" in name or "relaxed" in name else None)
    return decoder.decode(Target(network, request), request)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("control", [False, True])
def test_sample_j_alone_is_sample_j_in_a_batch(name: str, control: bool) -> None:
    request = toy_request(8, control, cfg=2.5, control_cfg=1.5 if control else None)
    together = run(name, request).latents_BLC
    assert together.isfinite().all() and together.shape == (8, LENGTH, 4)
    for j in (0, 7):
        torch.testing.assert_close(run(name, one_of(request, j)).latents_BLC[0], together[j], rtol=1e-9, atol=1e-9)
    assert (together[0] - together[3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_given_tokens_stay_and_matter(name: str) -> None:
    """Inpainting and outpainting, with other places in each picture."""
    given = torch.full((3, LENGTH, 4), torch.nan, dtype=torch.float64)
    given[0, :5], given[1, 3::2], given[2] = 0.5, -0.25, 0.1
    free = given.isnan().any(-1)
    request = toy_request(3)
    painted = run(name, replace(request, forced_BLC=given)).latents_BLC
    assert torch.equal(painted[~free], given[~free]) and painted.isfinite().all()
    other = run(name, replace(request, forced_BLC=given + 0.5)).latents_BLC
    assert (painted - other)[0][free[0]].abs().max() > 1e-4
    alone = run(name, one_of(replace(request, forced_BLC=given), 1)).latents_BLC
    torch.testing.assert_close(alone[0], painted[1], rtol=1e-9, atol=1e-9)


def test_the_share_of_the_target_is_of_each_picture() -> None:
    """Pictures with other numbers of free tokens have other numbers of steps."""
    given = torch.full((2, LENGTH, 4), torch.nan, dtype=torch.float64)
    given[0, :13] = 0.5
    request = replace(toy_request(2, steps=8), forced_BLC=given)
    decoder = Cspd(nearby(MASKED), 2, prefill=0.5)
    together = decoder.decode(Target(MASKED, request), request).latents_BLC
    for j in (0, 1):
        one = one_of(request, j)
        alone = decoder.decode(Target(MASKED, one), one).latents_BLC
        torch.testing.assert_close(alone[0], together[j], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["masked", "ar-continuous"])
def test_control_and_class_matter(name: str) -> None:
    plain, controlled = (run(name, toy_request(2, control)).latents_BLC for control in (False, True))
    assert (plain - controlled).abs().amax(dim=(1, 2)).min() > 1e-3
    swapped = run(name, replace(toy_request(2), condition=toy_request(3).condition.cat([toy_request(1).condition] * 2)))
    assert torch.equal(plain[0], swapped.latents_BLC[0])
    assert (plain[1] - swapped.latents_BLC[1]).abs().max() > 1e-3


def test_guidance_of_control_alone_and_of_the_class_alone() -> None:
    """cfg 1 and control_cfg 1 are the unguided law with control; control_cfg 0 is the law without control."""
    request = toy_request(2, True)
    for name in ("masked", "ar-continuous"):
        plain = run(name, request).latents_BLC
        same = run(name, toy_request(2, True, cfg=1.0, control_cfg=1.0)).latents_BLC
        torch.testing.assert_close(plain, same, rtol=0, atol=1e-9)
        guided = run(name, toy_request(2, True, cfg=3.0, control_cfg=1.5)).latents_BLC
        assert (guided - plain).abs().max() > 1e-3
        constant = type(DECODERS[name][0])(ramp="constant")
        network = DECODERS[name][1]
        without, bare = (constant.decode(Target(network, one), one).latents_BLC
                         for one in (toy_request(2, True, cfg=1.0, control_cfg=0.0), toy_request(2)))
        variance_differs = (without - bare).abs().max()     # without control there is no other variance either
        assert variance_differs < 1e-9


@pytest.mark.parametrize("name", ["masked", "ar-continuous"])
def test_control_first_compares_with_the_control_alone(name: str) -> None:
    """cfg 0 in this order is the law of the control without a class."""
    decoder, network = type(DECODERS[name][0])(ramp="constant"), DECODERS[name][1]
    request = toy_request(2, True)
    alone = replace(request, guidance=Guidance(0.0, 1.0, order="control-first"))
    no_class = replace(request, condition=network.null(request.condition))
    found, expected = (decoder.decode(Target(network, one), one).latents_BLC for one in (alone, no_class))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    both = replace(request, guidance=Guidance(3.0, 1.5, order="control-first"))
    other = replace(request, guidance=Guidance(3.0, 1.5))
    results = [decoder.decode(Target(network, one), one).latents_BLC for one in (both, other, request)]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(results, results[1:]))


@pytest.mark.parametrize("options", [{"cfg": 0.0}, {"cfg": 3.0, "control_cfg": 0.0}, {"cfg": 0.0, "control_cfg": 2.0}])
def test_a_scale_of_zero_is_the_limit_of_small_ones(options: dict[str, float]) -> None:
    """On the ramp: the first steps are guided by little, whatever the full scale."""
    for name in ("masked", "ar-continuous"):
        zero, small = (run(name, toy_request(2, True, **{key: value or least for key, value in options.items()}))
                       for least in (0.0, 1e-9))
        torch.testing.assert_close(zero.latents_BLC, small.latents_BLC, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 64, 1000])
def test_any_number_of_steps(steps: int) -> None:
    request = toy_request(2, steps=steps)
    result = Masked().decode(Target(toy_mar(), request), request)
    assert result.stats.forward_passes == min(steps, LENGTH) and result.latents_BLC.isfinite().all()
    assert sum(result.stats.accepted_per_pass) == LENGTH


def test_plain_decoding_is_what_cspd_converges_to_when_the_draft_is_the_target() -> None:
    for plain, network, steps in ((ArContinuous(last_noise=True), toy_causal(), None),
                                  (Masked(last_noise=True), toy_mar(), 6)):
        request = toy_request(3, True, cfg=2.0, steps=steps)
        want = plain.decode(Target(network, request), request).latents_BLC
        got = Cspd(network, 3).decode(Target(network, request), request)
        assert got.stats.extra["acceptance"] == 1 and got.stats.extra["tries"] == 0
        torch.testing.assert_close(got.latents_BLC, want, rtol=1e-9, atol=1e-9)


def test_caches_after_a_rollback_equal_a_fresh_run() -> None:
    """F3: after every round the valid part of both caches holds what reading the accepted tokens anew would write."""
    target, draft = CAUSAL, nearby(CAUSAL)
    request = toy_request(3, True, cfg=2.0)
    run_ = SpeculativeRun(Cspd(draft, 3), target, request)
    while bool((run_.cursor_B < LENGTH).any()):
        run_.round()
        for network, model in ((run_.target, target), (run_.draft, draft)):
            contexts: Any = network.contexts
            valid = (contexts._read_B + model.prefix_length).tolist()
            fresh = fresh_cache(model, request, run_.canvas_BLC)
            for layer in range(len(model.layers)):
                for ours, theirs in ((contexts._cache.keys, fresh.keys), (contexts._cache.values, fresh.values)):
                    for row, stop in enumerate(valid * 2):
                        torch.testing.assert_close(ours[layer][row, :, :stop], theirs[layer][row, :, :stop],
                                                   rtol=0, atol=1e-9)
    assert run_.rejected > 0 and int(run_.kept_B.sum()) > 0, "this test needs both"


def fresh_cache(model: Any, request: Any, canvas_BLC: torch.Tensor) -> Any:
    from arimg.accel.contexts import CausalContexts, Tokens
    contexts = CausalContexts(model, request, branches_of(request, "linear"))
    rows = torch.arange(len(canvas_BLC))
    tokens = Tokens(rows, torch.zeros_like(rows), torch.full_like(rows, LENGTH - 1))
    contexts.read(canvas_BLC, torch.full((len(rows), 1), LENGTH - 1), tokens)
    return contexts._cache


CORNERS = list(product((torch.float32, torch.bfloat16), (16, 64), (0.5, 1.3), (1.0, 5.0)))
QUICK = ((torch.float32, 64, 1.3, 5.0), (torch.bfloat16, 16, 0.5, 1.0))


@pytest.mark.parametrize("dtype,channels,temperature,cfg", [
    corner if corner in QUICK else pytest.param(*corner, marks=pytest.mark.slow) for corner in CORNERS])
def test_no_nan(dtype: torch.dtype, channels: int, temperature: float, cfg: float) -> None:
    request = toy_request(2, cfg=cfg, temperature=temperature)
    causal, draft = (toy_causal(seed, latent_channels=channels).to(dtype) for seed in (0, 1))
    masked, masked_draft = (toy_mar(seed, latent_channels=channels).to(dtype) for seed in (0, 1))
    for decoder, network, steps in ((ArContinuous(), causal, None), (Cspd(draft, 3), causal, None),
                                    (JacobiContinuous(3), causal, None), (Masked(), masked, 4),
                                    (Cspd(masked_draft, 2), masked, 4),
                                    (CspdRelaxed(masked_draft, 2, tries=4), masked, 4)):
        here = replace(request, steps=steps)
        latents = decoder.decode(Target(network, here), here).latents_BLC
        assert latents.dtype == torch.float32 and latents.isfinite().all(), type(decoder).__name__


def test_jacobi_tolerance_bounds_the_difference_and_saves_passes() -> None:
    request = toy_request(3)
    plain = ArContinuous().decode(Target(toy_causal(), request), request)
    errors, passes = [], []
    for tolerance in (0.0, 1e-3, 0.3):
        result = JacobiContinuous(8, tolerance).decode(Target(toy_causal(), request), request)
        errors.append(float((result.latents_BLC - plain.latents_BLC).abs().max()))
        passes.append(result.stats.forward_passes)
    assert errors[0] < 1e-9 and errors[0] <= errors[1] < 0.1
    assert passes[0] <= LENGTH and passes[2] <= passes[1] <= passes[0]


def test_steps_are_reported() -> None:
    for name in ("masked", "cspd masked", "cspd-relaxed", "jacobi causal"):
        seen: list[Any] = []
        decoder, network = DECODERS[name]
        request = toy_request(2, steps=6 if hasattr(network, "context") else None)
        result = decoder.decode(Target(network, request), request, seen.append)
        assert [info.forward_pass for info in seen] == sorted(info.forward_pass for info in seen)
        assert seen[-1].fixed_tokens == seen[-1].total_tokens == 2 * LENGTH, name
        assert result.stats.forward_passes == seen[-1].forward_pass


@pytest.mark.parametrize("decoder,network,options,message", [
    (Masked(), toy_causal(), {}, "ar-continuous"),
    (ArContinuous(), toy_mar(), {}, "masked"),
    (Masked(), toy_mar(), {"steps": 0}, "--steps 0"),
    (ArContinuous(), toy_causal(), {"steps": 3}, "--steps 3"),
    (Masked(), toy_mar(), {"sampling": Sampling(top_k=3)}, "top-k 3"),
    (Masked(), toy_mar(), {"guidance": Guidance(plausibility=0.1)}, "plausibility 0.1"),
    (Masked(), toy_mar(), {"forced_BL": torch.zeros(1)}, "continuous"),
    (Masked(), toy_mar(), {"forced_BLC": torch.zeros(3, 2, 4)}, "(3, 2, 4)"),
    (Cspd(), toy_mar(), {}, "Cspd(draft)"),
    (Cspd(toy_causal()), toy_mar(), {}, "different kinds"),
    (Cspd(toy_causal(latent_channels=3)), toy_causal(), {}, "different kinds"),
    (Cspd(toy_pipeline().transformer), toy_causal(), {}, "different kinds"),
    (Cspd(toy_causal()), toy_causal(), {"sampling": Sampling(0.0)}, "no density"),
    (Cspd(toy_causal()), toy_causal(0, replace(HEAD, method="ddim")), {}, "no density"),
    (Masked(last_noise=True), toy_mar(0, replace(HEAD, method="ddim")), {}, "no density"),
    (Cspd(toy_causal(num_classes=2)), toy_causal(), {}, "has 2 classes, the model 3"),
    (Cspd(toy_mar(grid=3)), toy_mar(), {}, "has 3 tokens per side, the model 4"),
    (Cspd(toy_causal(dim=16)), toy_causal(), {"inject_KBLD": toy_inject(3)}, "3 points of width 32"),
    (CspdRelaxed(toy_mar(inject_encoder=())), toy_mar(), {"inject_KBLD": toy_inject(3)}, "3 points of width 32"),
    (CspdRelaxed(toy_mar(latent_channels=3)), toy_mar(), {}, "different kinds"),
    (CspdRelaxed(toy_mar()), toy_mar(0, replace(HEAD, method="ddim")), {}, "no density"),
    (CspdRelaxed(toy_mar()), toy_mar(), {"sampling": Sampling(0.0)}, "no density"),
    (CspdRelaxed(), toy_mar(), {}, "CspdRelaxed(draft)"),
    (CspdRelaxed(toy_causal()), toy_causal(), {}, "MAR"),
])
def test_refusals(decoder: Any, network: Any, options: dict[str, Any], message: str) -> None:
    request = replace(toy_request(3), **options)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")) as caught:
        decoder.decode(Target(network, request), request)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [
    lambda: Cspd(window=0), lambda: Cspd(window="wide"), lambda: Cspd(prefill=2.0), lambda: JacobiContinuous(0),
    lambda: JacobiContinuous(tolerance=-1.0), lambda: CspdRelaxed(window=0), lambda: CspdRelaxed(prefill=-0.1),
    lambda: CspdRelaxed(inner_temperature=0.0)])
def test_wrong_arguments(build: Any) -> None:
    with pytest.raises(InputError):
        build()
