from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.target import Target, branch_scales, filter_probs, mix
from arimg.control.fusion import combine
from arimg.errors import InputError
from arimg.models.ar import ARTransformer
from tests.models.toy import toy_captions, toy_classes, toy_codes, toy_inject, toy_model

GRID, LENGTH = (4, 4), 16


def request(batch: int = 2, **changes: Any) -> DecodeRequest:
    condition = changes.pop("condition", toy_classes(batch))
    return DecodeRequest(condition, GRID, torch.arange(batch), **changes)


@torch.no_grad()
def guided(model: ARTransformer, codes: Tensor, **changes: Any) -> Tensor:
    """Guided logits_BLV of all positions for these codes."""
    target = Target(model, request(codes.shape[0], **changes))
    positions = torch.arange(LENGTH - 1).expand(codes.shape[0], -1)
    return torch.cat([target.start_logits(), target.step_logits(codes[:, :-1], positions)], dim=1)


class Recorder:
    """A backbone that notes the rows of every pass."""

    def __init__(self, model: ARTransformer) -> None:
        self.model, self.rows = model, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, x: Tensor, *args: Any) -> Tensor:
        self.rows.append(x.shape[0])
        return self.model.step(x, *args)

    def predict(self, x: Tensor, *args: Any) -> Tensor:
        self.rows.append(x.shape[0])
        return self.model.predict(x, *args)


@pytest.mark.parametrize("guidance, controlled, branches", [
    (Guidance(), True, ["full"]),
    (Guidance(), False, ["full"]),
    (Guidance(cfg=3.0), True, ["full", "null"]),
    (Guidance(cfg=3.0, control_cfg=3.0), True, ["full", "null"]),
    (Guidance(cfg=3.0, control_cfg=2.0), True, ["full", "class", "null"]),
    (Guidance(cfg=3.0, control_cfg=2.0), False, ["full", "null"]),
    (Guidance(cfg=1.0, control_cfg=2.0), True, ["full", "class"]),
    (Guidance(cfg=3.0, control_cfg=0.0), True, ["class", "null"]),
    (Guidance(cfg=3.0, control_cfg=0.0, interval=(0, 4)), True, ["full", "class", "null"]),
    (Guidance(cfg=1.0, control_cfg=0.0), True, ["class"]),
    (Guidance(cfg=0.0), True, ["null"]),
    (Guidance(cfg=1.0, interval=(2, None)), True, ["full"]),
    (Guidance(cfg=3.0, control_cfg=2.0, order="control-first"), True, ["full", "map", "null"]),
    (Guidance(cfg=3.0, control_cfg=2.0, order="control-first"), False, ["full", "null"]),
    (Guidance(cfg=3.0, control_cfg=1.0, order="control-first"), True, ["full", "map"]),
    (Guidance(cfg=0.0, control_cfg=2.0, order="control-first"), True, ["map", "null"]),
    (Guidance(cfg=0.0, control_cfg=1.0, order="control-first"), True, ["map"]),
])
def test_branches_of_weight_zero_are_not_computed(guidance: Guidance, controlled: bool, branches: list[str]) -> None:
    assert list(branch_scales(guidance, controlled)) == branches
    recorder = Recorder(toy_model())
    target = Target(recorder, request(inject_KBLD=toy_inject(2) if controlled else None, guidance=guidance))
    with torch.no_grad():
        target.start()
    assert recorder.rows == [2 * len(branches)]


@pytest.mark.parametrize("cfg", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("control_cfg", [None, 0.0, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("order", ["class-first", "control-first"])
def test_three_branch_formula(order: str, cfg: float, control_cfg: float | None) -> None:
    model, codes, inject = toy_model().double(), toy_codes(2), toy_inject(2).double()
    nothing = model.null(toy_classes(2))
    full = model(codes, toy_classes(2), GRID, inject)
    null = model(codes, nothing, GRID)
    control = cfg if control_cfg is None else control_cfg
    if order == "class-first":
        plain = model(codes, toy_classes(2), GRID)
        expected = null + cfg * (plain - null) + control * (full - plain)
    else:
        lines = model(codes, nothing, GRID, inject)
        expected = null + control * (lines - null) + cfg * (full - lines)
    got = guided(model, codes, inject_KBLD=inject, guidance=Guidance(cfg, control_cfg, order=order))
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(4.0), Guidance(4.0, 2.0, (3, 9), "control-first"),
                                      Guidance(0.0, 0.0)])
def test_implausible_codes_are_barred_by_the_unguided_law(guidance: Guidance) -> None:
    model, codes, inject = toy_model().double(), toy_codes(2), toy_inject(2).double()
    full_BLV = model(codes, toy_classes(2), GRID, inject).softmax(-1).detach()
    free = guided(model, codes, inject_KBLD=inject, guidance=guidance)
    for share in (0.3, 1.0):
        got = guided(model, codes, inject_KBLD=inject, guidance=replace(guidance, plausibility=share))
        plausible_BLV = full_BLV >= share * full_BLV.amax(-1, keepdim=True) * (1 - 1e-12)
        assert torch.equal(got.isfinite(), plausible_BLV)
        torch.testing.assert_close(got[plausible_BLV], free[plausible_BLV])
        assert plausible_BLV.sum(-1).min() >= 1 and not plausible_BLV.all()


def test_caption_guidance_keeps_the_prompts_mask_in_the_null_half() -> None:
    model, codes, condition = toy_model(conditioning="text").double(), toy_codes(3), toy_captions(3)
    full, null = (model(codes, part, GRID) for part in (condition, model.null(condition)))
    got = guided(model, codes, condition=condition, guidance=Guidance(cfg=4.0))
    torch.testing.assert_close(got, (null + 4.0 * (full - null)).detach())


@pytest.mark.parametrize("interval", [(0, None), (0, 1), (0, 6), (3, None), (3, 6), (15, None), (0, 99)])
def test_interval_guides_exactly_its_positions(interval: tuple[int, int | None]) -> None:
    model, codes, inject = toy_model(), toy_codes(2), toy_inject(2)
    scales = {"cfg": 3.0, "control_cfg": 2.0}
    got = guided(model, codes, inject_KBLD=inject, guidance=Guidance(interval=interval, **scales))
    inside, outside = guided(model, codes, inject_KBLD=inject, guidance=Guidance(**scales)), guided(
        model, codes, inject_KBLD=inject)
    positions = torch.arange(LENGTH)
    within = (positions >= interval[0]) & (positions < (interval[1] or LENGTH))
    torch.testing.assert_close(got[:, within], inside[:, within], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, ~within], outside[:, ~within], rtol=1e-5, atol=1e-5)
    assert (inside - outside).abs().amax((0, 2)).min() > 1e-2


def test_defect_08_other_branches_stop_with_the_interval() -> None:
    """The original went on computing the null half after its guidance had ended."""
    model, codes = toy_model(), toy_codes(2)
    recorder = Recorder(model)
    guidance = Guidance(cfg=3.0, interval=(0, 4))
    target = Target(recorder, request(guidance=guidance))
    positions = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        logits = [target.start_logits()]
        for j in range(LENGTH - 1):
            logits.append(target.step_logits(codes[:, j:j + 1], positions[:, j:j + 1], reached=j))
    assert recorder.rows == [4] * 4 + [2] * 12
    torch.testing.assert_close(torch.cat(logits, dim=1), guided(model, codes, guidance=guidance), rtol=1e-4, atol=1e-4)


def test_strength_zero_equals_no_control_bit_for_bit() -> None:
    model, codes = toy_model(), toy_codes(2)
    zero = combine([toy_inject(2)], [0.0], [0.0], [1.0])
    for cfg in (1.0, 3.0):
        assert torch.equal(guided(model, codes, inject_KBLD=zero, guidance=Guidance(cfg)),
                           guided(model, codes, guidance=Guidance(cfg)))


def test_start_and_end_touch_exactly_their_positions() -> None:
    model, codes, inject = toy_model(), toy_codes(1), toy_inject(1)
    plain, full = guided(model, codes), guided(model, codes, inject_KBLD=inject)
    late = guided(model, codes, inject_KBLD=combine([inject], [1.0], [0.5], [1.0]))
    early = guided(model, codes, inject_KBLD=combine([inject], [1.0], [0.0], [0.5]))
    assert torch.equal(late[:, :8], plain[:, :8]) and torch.equal(early[:, :8], full[:, :8])
    assert (late - plain)[:, 8:].abs().amax(-1).min() > 1e-2
    assert (early - full)[:, 8:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_control_guidance_touches_exactly_the_positions_of_its_control(cfg: float) -> None:
    model, codes = toy_model().double(), toy_codes(2)
    late = combine([toy_inject(2).double()], [1.0], [0.5], [1.0])
    joint, apart = (guided(model, codes, inject_KBLD=late, guidance=Guidance(cfg, control_cfg))
                    for control_cfg in (cfg, 2.0))
    torch.testing.assert_close(apart[:, :8], joint[:, :8], rtol=0, atol=1e-12)
    torch.testing.assert_close(apart[:, :8], guided(model, codes, guidance=Guidance(cfg))[:, :8], rtol=0, atol=1e-12)
    assert (apart - joint)[:, 8:].abs().amax(-1).min() > 1e-3


def test_two_controls_touch_exactly_the_positions_of_each() -> None:
    model, codes, a, b = toy_model(), toy_codes(1), toy_inject(1, seed=3), toy_inject(1, seed=4)
    both = guided(model, codes, inject_KBLD=combine([a, b], [1.0, 1.0], [0.25, 0.5], [0.75, 1.0]))
    first, plain = guided(model, codes, inject_KBLD=combine([a], [1.0], [0.25], [0.75])), guided(model, codes)
    assert torch.equal(both[:, :4], plain[:, :4]) and torch.equal(both[:, :8], first[:, :8])
    assert (both - plain)[:, 4:].abs().amax(-1).min() > 1e-3
    assert (both - first)[:, 8:].abs().amax(-1).min() > 1e-3


def test_two_controls_add_up() -> None:
    model, codes, a, b = toy_model(), toy_codes(1), toy_inject(1, seed=3), toy_inject(1, seed=4)
    both = guided(model, codes, inject_KBLD=combine([a, b], [1.0, 0.5], [0.0, 0.0], [1.0, 1.0]))
    torch.testing.assert_close(both, guided(model, codes, inject_KBLD=a + 0.5 * b))
    assert not torch.allclose(both, guided(model, codes, inject_KBLD=a), atol=1e-2)


def test_ragged_positions_and_fillers() -> None:
    model, codes = toy_model(), toy_codes(2)
    setting: dict[str, Any] = {"inject_KBLD": toy_inject(2), "guidance": Guidance(cfg=2.0, interval=(0, 5))}
    expected = guided(model, codes, **setting)
    target = Target(model, request(**setting))
    with torch.no_grad():
        target.start()
        target.step_logits(codes[:, :12], torch.arange(12).expand(2, -1))
        positions = torch.tensor([[12, 13, 14, 15, 16], [3, 4, 5, 6, 7]])      # row 0 runs over the end
        logits = target.step_logits(codes.gather(1, positions.clamp(max=15)), positions)
        again = target.step_logits(codes[:, 14:15], torch.full((2, 1), 14))
    torch.testing.assert_close(logits[0, :3], expected[0, 13:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], expected[1, 4:9], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again[0], expected[0, 15:], rtol=1e-4, atol=1e-4)


def test_a_target_can_start_again() -> None:
    target = Target(toy_model(), request())
    with torch.no_grad():
        first = target.start()
        target.step(toy_codes(2, 1), torch.zeros(2, 1, dtype=torch.int64))
        assert target.forward_passes == 2
        assert torch.equal(target.start(), first) and target.forward_passes == 1


def probs(values: list[float], **changes: Any) -> list[float]:
    """Filtered probabilities of log(values), rounded."""
    return [round(p, 4) for p in filter_probs(torch.tensor(values).log(), Sampling(**changes)).tolist()]


@pytest.mark.parametrize("changes, expected", [
    ({}, [0.5, 0.3, 0.15, 0.05]),
    ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
    ({"temperature": 0.0}, [1, 0, 0, 0]),
    ({"temperature": 0.0, "top_p": 0.1}, [1, 0, 0, 0]),
    ({"top_k": 2}, [0.625, 0.375, 0, 0]),
    ({"top_k": 99}, [0.5, 0.3, 0.15, 0.05]),
    ({"top_p": 0.4}, [1, 0, 0, 0]),
    ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),                     # the code that crosses p survives
    ({"top_k": 3, "top_p": 0.9}, [0.5263, 0.3158, 0.1579, 0]),  # 0.84 before the third: the nucleus is that of top-k
    ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),
])
def test_filters_by_hand(changes: dict[str, Any], expected: list[float]) -> None:
    assert probs([0.5, 0.3, 0.15, 0.05], **changes) == expected


def test_ties_with_the_kth_survive() -> None:
    assert probs([0.4, 0.2, 0.2, 0.2], top_k=2) == [0.4, 0.2, 0.2, 0.2]
    assert probs([0.25] * 4, temperature=0.0) == [1, 0, 0, 0]


def test_precision_of_probabilities() -> None:
    assert filter_probs(torch.randn(3, 8).bfloat16(), Sampling(top_k=4, top_p=0.9)).dtype == torch.float32
    assert filter_probs(torch.randn(3, 8).double(), Sampling(top_k=4, top_p=0.9)).dtype == torch.float64
    model = toy_model()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        with torch.no_grad():
            law = Target(model.to(dtype), request()).start()
        assert law.dtype == expected
        torch.testing.assert_close(law.sum(-1), torch.ones(2, 1, dtype=expected))


def test_mix_is_the_originals_formula() -> None:
    cond, null = torch.randn(2, 3, 1, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    scales = branch_scales(Guidance(cfg=2.5), controlled=False)
    assert torch.equal(mix(torch.stack([cond, null]), scales), null + 2.5 * (cond - null))


@pytest.mark.parametrize("wrong", [{"cfg": float("nan")}, {"cfg": -1.0}, {"control_cfg": float("inf")},
                                   {"interval": (4, 4)}, {"interval": (-1, None)}])
def test_guidance_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--(cfg|control-cfg|cfg-interval) "):
        Guidance(**wrong)


@pytest.mark.parametrize("from_below", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_breaks_ties_as_a_stable_sort_does(from_below: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for top_p in (0.05, 0.3, 0.5, 0.77, 0.95):
        logits_BWV = torch.randint(-2, 3, (20, 3, 17), generator=generator).to(dtype)
        logits_BWV[0] = 0.0
        logits_BWV[1, :, 4:] = float("-inf")
        ranked_BWV, order_BWV = logits_BWV.sort(dim=-1, descending=not from_below, stable=True)
        held_BWV = ranked_BWV.softmax(-1).cumsum(-1)
        cut_BWV = held_BWV <= 1 - top_p if from_below else held_BWV.roll(1, -1) > top_p
        cut_BWV[..., -1 if from_below else 0] = False
        cut_BWV = torch.zeros_like(cut_BWV).scatter(-1, order_BWV, cut_BWV)
        p_BWV = filter_probs(logits_BWV, Sampling(top_p=top_p), from_below)
        torch.testing.assert_close(p_BWV, logits_BWV.masked_fill(cut_BWV, float("-inf")).softmax(-1), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 2.0},
                                   {"top_p": 0.0}, {"top_p": float("nan")}])
def test_sampling_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--(temperature|top-k|top-p) "):
        Sampling(**wrong)
