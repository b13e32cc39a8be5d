"""DD1's student of VAR: as LlamaGen's, and its masks and maps."""

from __future__ import annotations

import torch

from arimg.accel.base import DecodeRequest
from arimg.accel.scale import latent_map, scale_ends
from arimg.interop.dd1 import infer_var_student_config, student_from_dd, var_student_config_from_dd
from arimg.models.base import Condition
from arimg.models.students import clean_mask
from arimg.models.var_students import VARStudent, VARStudentConfig
from tests.parity.checkers.dd1_llamagen_student import check_passes
from tests.parity.checkers.dd_var import space_of
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    student, space, noise_BLC = build(fixture), space_of(fixture), fixture["in.noise"]
    scales = student.config.scales
    ends = list(scale_ends(scales))
    fixture.compare("out.attn_mask", student.mask(noise_BLC.device).to(torch.uint8))
    noisy_SL = ~clean_mask(torch.tensor(ends[:-1]), noise_BLC.shape[1])
    fixture.compare("out.noise_mask", noisy_SL.to(noise_BLC.dtype))
    request = DecodeRequest(Condition(class_ids_B=fixture["in.label"]), scales[-1], torch.arange(len(noise_BLC)),
                            space=space)
    sequences = check_passes(fixture, student, request, space.codebook_VC, ends)
    for step, tokens_BLC in sequences.items():
        fixture.compare(f"out.{step}.f_hat", latent_map(tokens_BLC, scales[-1], space))


def build(fixture: Fixture) -> VARStudent:
    """The student of the fixture's config with its weights; shapes tell the same sizes."""
    config, state = VARStudentConfig(**var_student_config_from_dd(fixture.spec["config"])), fixture.state_dict("dd.")
    inferred = infer_var_student_config(state, config.heads)
    for name in ("vocab_size", "codebook_dim", "scales", "dim", "layers", "heads", "num_classes", "l2_attention"):
        assert getattr(config, name) == getattr(VARStudentConfig(**inferred), name), name
    student = VARStudent(config)
    student.load_state_dict(student_from_dd(state))
    return student.eval()
