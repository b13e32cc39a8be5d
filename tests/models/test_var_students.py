"""DD1's student of VAR: what each output may depend on, and what a new one takes from its teacher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arimg.models.generators import VARGenerator, VARGeneratorConfig
from arimg.models.students import StudentOutput
from arimg.models.var import VARConfig, VARTransformer
from arimg.models.var_students import VARStudent, VARStudentConfig
from tests.accel.toy_pyramid import CLASSES, scale_of, toy_inject
from tests.models.toy_students import moved, perturb, toy_latents
from tests.models.toy_var import CHANNELS, ENDS, LENGTH, SCALES, SIZES


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def student(request: pytest.FixtureRequest) -> VARStudent:
    """With AdaLN layers of each block, or one for all."""
    made: VARStudent = perturb(VARStudent(VARStudentConfig(**SIZES, shared_adaln=request.param)))
    return made


@torch.no_grad()
def outputs(student: VARStudent, latents: Tensor, clean: int = 0, inject: Tensor | None = None) -> StudentOutput:
    result: StudentOutput = student(latents, torch.full((2,), clean), CLASSES, SCALES[-1], inject)
    return result


@pytest.mark.parametrize("j", [0, 3, 9])
def test_noise_and_control_of_a_token_move_it_and_finer_scales_alone(student: VARStudent, j: int) -> None:
    latents = toy_latents(2, LENGTH, channels=CHANNELS)
    inject = toy_inject()
    before = outputs(student, latents, 1, inject)
    for what in ("noise", "control"):
        other_latents, other_inject = latents.clone(), inject.clone()
        (other_latents[:, j] if what == "noise" else other_inject[:, :, j]).add_(0.5)
        for one, two in zip(before, outputs(student, other_latents, 1, other_inject)):
            assert moved(one, two) == [j, *range(ENDS[scale_of(j) + 1], LENGTH)], f"{what} {j}"


def test_the_timestep_marks_whole_scales(student: VARStudent) -> None:
    latents = toy_latents(2, LENGTH, channels=CHANNELS)
    assert moved(outputs(student, latents, 1).logits_BLV, outputs(student, latents, 5).logits_BLV)[0] == 1
    mixed = student(latents, torch.tensor([1, 5]), CLASSES, SCALES[-1])
    for row, clean in enumerate((1, 5)):
        torch.testing.assert_close(mixed.logits_BLV[row], outputs(student, latents, clean).logits_BLV[row])


@pytest.mark.parametrize("scales", [SCALES, ((2, 2), (4, 4))])
def test_a_new_student_takes_the_teachers_tables_by_meaning(scales: tuple[tuple[int, int], ...]) -> None:
    """The class level is the teacher's first row, the first scale is fresh, finer scales are the teacher's; so is the
    whole class table, of which the released initialisation lost the second row."""
    teacher = perturb(VARTransformer(VARConfig(**{**SIZES, "scales": scales})))
    student = VARStudent.from_teacher(teacher)
    own, given, first = student.backbone, teacher.state_dict(), scales[0][0] * scales[0][1]
    assert torch.equal(own.class_emb.weight, given["class_emb.weight"])
    levels, places = own.lvl_embed.weight, own.pos_1LC[0]
    assert torch.equal(levels[0], given["lvl_embed.weight"][0])
    assert torch.equal(levels[2:], given["lvl_embed.weight"][1:])
    assert not bool((levels[1] == given["lvl_embed.weight"]).all(-1).any())
    assert torch.equal(places[0], given["pos_1LC"][0, 0])
    assert torch.equal(places[1 + first:], given["pos_1LC"][0, first:])
    assert not bool((places[1, None] == given["pos_1LC"][0]).all(-1).any())
    assert torch.equal(own.pos_start[0, 0], given["pos_start"][0, 0])
    tables = {"lvl_embed.weight", "pos_1LC", "pos_start"}
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in given.items() if name not in tables)


@pytest.mark.parametrize("depth,student,generator", [
    (16, 328_165_664, 329_514_272), (20, 635_399_088, 618_181_296), (24, 1_092_478_560, 1_048_434_784)])
def test_parameters_of_the_papers_sizes(depth: int, student: int, generator: int) -> None:
    sizes = {"dim": 64 * depth, "layers": depth, "heads": depth}
    with torch.device("meta"):
        networks = VARStudent(VARStudentConfig(**sizes)), VARGenerator(VARGeneratorConfig(**sizes))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [student, generator]
