from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, DecodeResult, Guidance, OnStep, Sampling, StepInfo
from arimg.accel.target import Target
from arimg.models.ar import ARTransformer
from arimg.noise import CounterNoise
from tests.models.toy import toy_classes, toy_codes, toy_inject, toy_model


def decode(model: ARTransformer, on_step: OnStep | None = None, seeds: list[int] | None = None,
           grid: tuple[int, int] = (4, 4), **changes: Any) -> DecodeResult:
    seeds = [7, 8, 9] if seeds is None else seeds
    request = DecodeRequest(toy_classes(len(seeds)), grid, torch.tensor(seeds), **changes)
    return PlainAR().decode(Target(model, request), request, on_step)


def codes_of(result: DecodeResult) -> Tensor:
    assert result.codes_BL is not None
    return result.codes_BL


def test_codes_are_the_gumbel_argmax_of_the_teacher_forced_law() -> None:
    model = toy_model().double()
    result = decode(model)
    codes = codes_of(result)
    log_p = model(codes, toy_classes(3), (4, 4)).log_softmax(-1)
    noise = CounterNoise().gumbel(torch.tensor([7, 8, 9]), torch.arange(16).expand(3, -1), 32)
    assert torch.equal((log_p + noise).argmax(-1), codes)
    assert result.stats.forward_passes == 16 and result.stats.accepted_per_pass == (1.0,) * 16


def test_temperature_zero_takes_the_most_likely_code() -> None:
    model = toy_model().double()
    codes = codes_of(decode(model, sampling=Sampling(temperature=0.0)))
    assert torch.equal(model(codes, toy_classes(3), (4, 4)).argmax(-1), codes)
    assert torch.equal(codes, codes_of(decode(model, sampling=Sampling(top_k=1))))


def test_first_code_follows_its_law() -> None:
    model, count = toy_model(), 4000
    request = DecodeRequest(toy_classes(1), (1, 1), torch.tensor([0]))
    with torch.no_grad():
        law = Target(model, request).start()[0, 0]
    draws = Target(model, DecodeRequest(toy_classes(1), (1, 1), torch.arange(count))).draw(
        law.expand(count, 1, -1), torch.zeros(count, 1, dtype=torch.int64))
    expected = law * count
    often = expected >= 5
    counts = torch.bincount(draws.flatten(), minlength=32).float()
    chi_square = float(((counts - expected)[often].square() / expected[often]).sum())
    degrees = int(often.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    assert degrees > 8


def test_forced_codes_are_kept_and_read() -> None:
    model, forced = toy_model().double(), torch.full((3, 16), -1)
    forced[0, :8] = toy_codes(1)[0, :8]
    forced[1, 5] = 3
    codes, free = codes_of(decode(model, forced_BL=forced)), codes_of(decode(model))
    assert torch.equal(codes[forced >= 0], forced[forced >= 0])
    assert torch.equal(codes[2], free[2]) and torch.equal(codes[1, :5], free[1, :5])
    log_p = model(codes, toy_classes(3), (4, 4)).log_softmax(-1)
    noise = CounterNoise().gumbel(torch.tensor([7, 8, 9]), torch.arange(16).expand(3, -1), 32)
    assert torch.equal((log_p + noise).argmax(-1)[forced < 0], codes[forced < 0])


def test_everything_forced() -> None:
    assert torch.equal(codes_of(decode(toy_model(), forced_BL=toy_codes(3))), toy_codes(3))


def test_on_step_reports_every_token() -> None:
    seen: list[StepInfo] = []
    shown: list[list[int]] = []

    def on_step(info: StepInfo) -> None:
        seen.append(info)
        shown.append(info.codes_BL[0, :len(seen)].tolist())
    codes = codes_of(decode(toy_model(), on_step))
    assert [info.forward_pass for info in seen] == list(range(1, 17))
    assert [info.fixed_tokens for info in seen] == [3 * j for j in range(1, 17)]
    assert {info.total_tokens for info in seen} == {48}
    assert shown[-1] == codes[0].tolist() and shown[4] == codes[0, :5].tolist()


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select",
                                                 "unique", "aten.equal", "_to_copy.cpu")), name
        return func(*args, **(kwargs or {}))


def test_loop_does_not_wait_for_the_device() -> None:
    guidance = Guidance(cfg=3.0, control_cfg=2.0, interval=(2, 8))
    with NoSync():
        decode(toy_model(), inject_KBLD=toy_inject(3), guidance=guidance, sampling=Sampling(0.9, 20, 0.9),
               forced_BL=torch.full((3, 16), -1))


def test_no_gradients_are_kept() -> None:
    assert not codes_of(decode(toy_model())).requires_grad
    target = decode(toy_model(), inject_KBLD=toy_inject(3).requires_grad_())
    assert target.codes_BL is not None and target.codes_BL.grad_fn is None
