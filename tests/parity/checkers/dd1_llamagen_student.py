"""DD1's student of LlamaGen: raw heads, one-step and two-step samples, rows at different timesteps in one batch."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.accel.dd1 import student_pass
from arimg.accel.flow import nearest
from arimg.interop.dd1 import ar_student_config_from_dd, infer_ar_student_config, student_from_dd
from arimg.models.base import Condition
from arimg.models.students import ARStudent, ARStudentConfig, clean_mask
from tests.parity.fixture import Fixture

LOG_ZERO = -1e9     # how the fixture writes -inf


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    student, noise_BLC = build(fixture), fixture["in.noise"]
    condition, grid = Condition(class_ids_B=fixture["in.label"]), (isqrt(noise_BLC.shape[1]),) * 2
    request = DecodeRequest(condition, grid, torch.arange(len(noise_BLC)))
    check_passes(fixture, student, request, fixture["in.codebook"], list(range(noise_BLC.shape[1] + 1)))


def build(fixture: Fixture) -> ARStudent:
    """The student of the fixture's config with its weights; shapes tell the same config."""
    config = ARStudentConfig(**ar_student_config_from_dd(fixture.spec["config"]))
    for name, value in infer_ar_student_config(fixture.state_dict(), config.heads).items():
        assert getattr(config, name) == value, name
    student = ARStudent(config)
    student.load_state_dict(student_from_dd(fixture.state_dict()))
    return student.eval()


def check_passes(fixture: Fixture, student: torch.nn.Module, request: DecodeRequest, codebook_VC: Tensor,
                 ends: list[int]) -> dict[str, Tensor]:
    """Compare all passes; `ends`: tokens before each unit. Returns the sequences after each."""
    settings, noise_BLC = fixture.settings, fixture["in.noise"]
    batch, length = noise_BLC.shape[:2]
    split = ends[settings["split_t"]]

    def heads(input_BLC: Tensor, clean_B: Tensor) -> tuple[Tensor, Tensor]:
        return student(input_BLC, clean_B, request.condition, request.grid, request.inject_KBLD)

    logits_BLV, latents_BLC = heads(noise_BLC, torch.zeros(batch, dtype=torch.int64))
    fixture.compare("out.t0.logits", logits_BLV)
    fixture.compare("out.t0.tokens", latents_BLC)
    tokens_BLC, sequences = noise_BLC, {}
    for number, timestep in enumerate(settings["t_list"], 1):
        clean_B = torch.full((batch,), ends[timestep])
        clean_BL1 = clean_mask(clean_B, length)[..., None]
        input_BLC = torch.where(clean_BL1, tokens_BLC, noise_BLC)
        logits_BLV, latents_BLC = heads(input_BLC, clean_B)
        codes_BL = nearest(input_BLC, codebook_VC)
        certain_BLV = torch.full_like(logits_BLV, LOG_ZERO).scatter_(-1, codes_BL[..., None], 0.0)
        tokens_BLC, _ = student_pass(student, tokens_BLC, noise_BLC, ends[timestep], split, request, codebook_VC)
        got = {"input": input_BLC, "nearest": codes_BL, "tokens_raw": latents_BLC, "logits_raw": logits_BLV,
               "tokens": torch.where(clean_BL1, input_BLC, latents_BLC),
               "logits": torch.where(clean_BL1, certain_BLV, logits_BLV), "sequence": tokens_BLC}
        for name in got:
            if f"out.step{number}.{name}" in fixture:
                fixture.compare(f"out.step{number}.{name}", got[name])
        sequences[f"step{number}"] = tokens_BLC
    check_mixed(fixture, student, request, ends, sequences["step1"])
    return sequences


def check_mixed(fixture: Fixture, student: torch.nn.Module, request: DecodeRequest, ends: list[int],
                first_BLC: Tensor) -> None:
    """Rows at timesteps of their own."""
    clean_B = torch.tensor([ends[int(t)] for t in fixture["in.t_mixed"]])
    input_BLC = torch.where(clean_mask(clean_B, first_BLC.shape[1])[..., None], first_BLC, fixture["in.noise"])
    logits_BLV, latents_BLC = student(input_BLC, clean_B, request.condition, request.grid, request.inject_KBLD)
    fixture.compare("out.mixed.input", input_BLC)
    fixture.compare("out.mixed.tokens", latents_BLC)
    fixture.compare("out.mixed.logits", logits_BLV)
