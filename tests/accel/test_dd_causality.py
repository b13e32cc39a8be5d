"""What a token may depend on, decoded: noise, tokens and control rows of later units never move it, in the teacher's
own map from noise to codes, in DD1's student and in DD2's generator. And the slot at which a control row acts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, Guidance
from arimg.accel.dd1 import Dd1, Schedule
from arimg.accel.dd2 import Dd2
from arimg.accel.flow import FlowSolver
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR, FlowScales
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from arimg.models.generators import ARGenerator, VARGenerator
from arimg.models.students import ARStudent
from arimg.models.var_students import VARStudent
from arimg.noise import CounterNoise, Purpose
from arimg.tokenizers.vq import VQSpace
from tests.accel.toy_pyramid import request as scales_request
from tests.accel.toy_pyramid import toy_teacher
from tests.exactness.toy import attentive_model, faint_inject
from tests.models.toy import toy_captions, toy_classes
from tests.models.toy_students import LATENTS, moved, perturb
from tests.models.toy_var import ENDS

SOLVER, HEAD, LENGTH = FlowSolver(8), {"head_width": 16, "head_depth": 2}, 16
SPACE = VQSpace(torch.randn(32, LATENTS, generator=torch.Generator().manual_seed(0)))


@dataclass(frozen=True)
class Nudged(CounterNoise):
    """Other noise at one position."""

    position: int = 0

    def normal(self, seeds_B: Tensor, positions_BW: Tensor, count: int, purpose: Purpose, draw: int = 0) -> Tensor:
        noise_BWC = super().normal(seeds_B, positions_BW, count, purpose, draw)
        return torch.where((positions_BW == self.position)[..., None], -3 * noise_BWC, noise_BWC)


def raster(kind: str) -> tuple[ARTransformer, DecodeRequest]:
    condition = toy_classes(4)
    if kind == "text":
        captions = toy_captions(4)
        assert captions.caption_BPC is not None
        condition = Condition(caption_BPC=captions.caption_BPC.double(), caption_mask_BP=captions.caption_mask_BP)
    return attentive_model(conditioning=kind), DecodeRequest(condition, (4, 4), torch.arange(4), faint_inject(4),
                                                             Guidance(2.0), space=SPACE)


def decoders(kind: str) -> tuple[Any, DecodeRequest, dict[str, Decoder]]:
    """(teacher, request, decoders) of a kind of model."""
    if kind == "scales":
        scales_teacher = toy_teacher()
        return scales_teacher, scales_request(), {
            "teacher": FlowScales(SOLVER),
            "dd1": Dd1(perturb(VARStudent.from_teacher(scales_teacher)), Schedule(split=1)),
            "dd2": Dd2(perturb(VARGenerator.from_teacher(scales_teacher, **HEAD)))}
    teacher, asked = raster(kind)
    return teacher, asked, {
        "teacher": FlowAR(SOLVER),
        "dd1": Dd1(perturb(ARStudent.from_teacher(teacher, LATENTS)), Schedule(split=8)),
        "dd2": Dd2(perturb(ARGenerator.from_teacher(teacher, LATENTS, **HEAD)))}


CASES = {kind: decoders(kind) for kind in ("class", "text", "scales")}


def tokens(result: DecodeResult) -> Tensor:
    """(B, L, ...): latents where there are any, as codes move less readily."""
    found = result.latents_BLC if result.latents_BLC is not None else result.codes_BL[..., None]  # type: ignore[index]
    return found


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", ["teacher", "dd1", "dd2"])
def test_noise_and_control_move_nothing_before_their_unit(kind: str, name: str) -> None:
    teacher, asked, all_decoders = CASES[kind]

    def decode(changed: DecodeRequest) -> Tensor:
        return tokens(all_decoders[name].decode(Target(teacher, changed), changed))
    before, reached = decode(asked), {"noise": 0, "control": 0}
    assert asked.inject_KBLD is not None
    positions = (0, 3, 9) if kind == "scales" else (0, 7, LENGTH - 1)
    for j in positions:
        inject_KBLD = asked.inject_KBLD.clone()
        inject_KBLD[:, :, j] *= -4
        for what, changed in (("noise", replace(asked, noise=Nudged(position=j))),
                              ("control", replace(asked, inject_KBLD=inject_KBLD))):
            places = moved(before, decode(changed))
            first = max(end for end in ENDS if end <= j) if kind == "scales" and what == "control" else j
            assert all(place >= first for place in places), f"{what} {j} moved {places}"
            reached[what] += j in places
            if kind == "scales":
                stop = next(end for end in ENDS if end > j)
                neighbours = {place for place in places if first <= place < stop} - {j}
                assert what == "control" or not neighbours, "of its own scale noise moves its own token alone"
    assert min(reached.values()) >= 2, "the change does arrive"


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("j", [0, 7, LENGTH - 1])
@torch.no_grad()
def test_tokens_move_nothing_before_them(kind: str, j: int) -> None:
    """Clean tokens in the student; tokens that were read in teacher and generator, which read them shifted by one."""
    teacher, asked, all_decoders = CASES[kind]
    codes = torch.arange(4 * LENGTH).view(4, LENGTH) % 32
    other = codes.clone()
    other[:, j] = (other[:, j] + 5) % 32
    student, generator = all_decoders["dd1"].student, all_decoders["dd2"].generator     # type: ignore[attr-defined]
    vectors = [SPACE.codebook_VC[one].double() for one in (codes, other)]
    clean_B = torch.full((4,), LENGTH)
    outputs = {
        "teacher": [teacher(one, asked.condition, asked.grid, asked.inject_KBLD) for one in (codes, other)],
        "dd2": [generator.features(one[:, :-1], asked.condition, asked.grid, asked.inject_KBLD) for one in vectors],
        "dd1": [student(one, clean_B, asked.condition, asked.grid, asked.inject_KBLD).latents_BLC for one in vectors],
    }
    for name, (one, two) in outputs.items():
        assert moved(one, two) == list(range(j if name == "dd1" else j + 1, LENGTH)), name


@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_slot_of_a_control_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row j lies at the slot whose output predicts token j: P-1+j in the shifted networks, P+j in the student, whose
    prefix gets none."""
    teacher, asked, all_decoders = CASES[kind]
    seen: list[Tensor] = []
    blocks = ARTransformer._blocks

    def recorded(self: ARTransformer, x_RWD: Tensor, window: Any, inject_KRWD: Tensor | None) -> Tensor:
        assert inject_KRWD is not None
        seen.append(inject_KRWD)
        return blocks(self, x_RWD, window, inject_KRWD)
    monkeypatch.setattr(ARTransformer, "_blocks", recorded)
    inject, prefix = asked.inject_KBLD, teacher.prefix_length
    assert inject is not None
    with torch.no_grad():
        teacher(torch.zeros(4, LENGTH, dtype=torch.int64), asked.condition, asked.grid, inject)
        for name in ("dd2", "dd1"):
            all_decoders[name].decode(Target(teacher, asked), asked)
    for name, first, rows in zip(("teacher", "dd2", "dd1"), (prefix - 1, prefix - 1, prefix), seen, strict=True):
        assert torch.equal(rows[:, :, first:], inject) and not rows[:, :, :first].any(), name
