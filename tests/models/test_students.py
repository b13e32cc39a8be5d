"""DD1's students: what each output may depend on, where control acts, and what a new one takes from its teacher."""

from __future__ import annotations

import pytest
import torch

from arimg.errors import ConfigError, InputError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.models.students import ARStudent, ARStudentConfig, StudentOutput
from arimg.presets import AR_PRESETS
from tests.models.toy import toy_captions, toy_classes, toy_inject, toy_model
from tests.models.toy_students import LATENTS, moved, toy_latents, toy_student

GRID, LENGTH = (4, 4), 16


@torch.no_grad()
def outputs(student: ARStudent, latents: torch.Tensor, clean: int = 0, condition: Condition = toy_classes(2),
            inject: torch.Tensor | None = None) -> StudentOutput:
    output: StudentOutput = student(latents, torch.full((2,), clean), condition, GRID, inject)
    return output


def double(condition: Condition) -> Condition:
    if condition.caption_BPC is None:
        return condition
    return Condition(caption_BPC=condition.caption_BPC.double(), caption_mask_BP=condition.caption_mask_BP)


CONDITIONS = {"class": toy_classes(2), "text": double(toy_captions(2))}


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("j", [0, 6, 15])
def test_noise_and_control_of_a_token_move_it_and_later_ones_alone(kind: str, j: int) -> None:
    student, condition = toy_student(conditioning=kind), CONDITIONS[kind]
    latents, inject = toy_latents(2), toy_inject(2).double()
    before = outputs(student, latents, 3, condition, inject)
    for what in ("noise", "control"):
        other_latents, other_inject = latents.clone(), inject.clone()
        (other_latents[:, j] if what == "noise" else other_inject[:, :, j]).add_(0.5)
        after = outputs(student, other_latents, 3, condition, other_inject)
        for one, two in zip(before, after):
            assert moved(one, two) == list(range(j, LENGTH)), f"{what} {j}"


def test_control_acts_one_slot_after_the_teachers() -> None:
    """Row j of the control lies at slot j+1 of the student, which reads token j, and not at slot j, which the teacher
    predicts it from: with all other tokens out of sight only the right slot reaches token j."""
    student, latents, inject = toy_student(), toy_latents(2), torch.zeros(3, 2, LENGTH, 32).double()
    inject[:, :, 7] = 1
    plain, steered = outputs(student, latents), outputs(student, latents, inject=inject)
    assert moved(plain.logits_BLV, steered.logits_BLV)[0] == 7
    shifted = outputs(student, latents, inject=inject.roll(-1, dims=2))
    assert moved(plain.logits_BLV, shifted.logits_BLV)[0] == 6, "an off-by-one is seen"


def test_the_condition_and_the_clean_tokens_matter() -> None:
    student, latents = toy_student(), toy_latents(2)
    before = outputs(student, latents)
    other = outputs(student, latents, condition=Condition(class_ids_B=torch.tensor([3, 4])))
    assert moved(before.logits_BLV, other.logits_BLV) == moved(before.latents_BLC, other.latents_BLC) == list(range(16))
    assert moved(before.logits_BLV, outputs(student, latents, 5).logits_BLV) == list(range(LENGTH))
    assert moved(outputs(student, latents, 4).logits_BLV, outputs(student, latents, 5).logits_BLV)[0] == 4


def test_rows_of_a_batch_have_their_own_timestep() -> None:
    student, latents = toy_student(), toy_latents(2)
    mixed = student(latents, torch.tensor([2, 9]), toy_classes(2), GRID)
    for row, clean in enumerate((2, 9)):
        torch.testing.assert_close(mixed.logits_BLV[row], outputs(student, latents, clean).logits_BLV[row])


def test_padded_caption_slots_do_not_matter() -> None:
    student, condition, latents = toy_student(conditioning="text"), CONDITIONS["text"], toy_latents(2)
    assert condition.caption_BPC is not None and condition.caption_mask_BP is not None
    other = condition.caption_BPC.masked_fill(~condition.caption_mask_BP[..., None], 7.0)
    one = outputs(student, latents, condition=condition)
    two = outputs(student, latents, condition=Condition(caption_BPC=other, caption_mask_BP=condition.caption_mask_BP))
    torch.testing.assert_close(one, two)


def test_a_new_student_takes_all_but_the_fresh_parts_from_its_teacher() -> None:
    teacher = toy_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = ARStudent.from_teacher(teacher, LATENTS)
    given, own = teacher.state_dict(), student.state_dict()
    fresh = {"backbone.tok_embeddings.weight", "backbone.tok_embeddings.bias", "n_d_embed.weight",
             "final_layer_conti.scale_shift_table", "final_layer_conti.linear.weight", "final_layer_conti.linear.bias"}
    assert set(own) == {f"backbone.{name}" for name in given if name != "tok_embeddings.weight"} | fresh
    for name, tensor in given.items():
        if name != "tok_embeddings.weight":
            assert torch.equal(own[f"backbone.{name}"], tensor), name
    assert own["backbone.tok_embeddings.weight"].std() < 0.1 and own["n_d_embed.weight"].std() > 0


def test_a_student_of_a_tied_teacher_reads_code_vectors_as_it_does() -> None:
    teacher = toy_model(codebook_dim=LATENTS)
    student = ARStudent.from_teacher(teacher, LATENTS)
    assert torch.equal(student.backbone.tok_embeddings.weight, teacher.codebook_in.weight)
    h_RWD = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student.backbone.logits(h_RWD), teacher.logits(h_RWD))
    with pytest.raises(ConfigError, match="latent_dim 6"):
        ARStudent.from_teacher(teacher, 6)


def test_wrong_conditions() -> None:
    with pytest.raises(InputError, match="caption"):
        outputs(toy_student(), toy_latents(2), condition=toy_captions(2))


@pytest.mark.parametrize("preset,parameters", [("B", 98_321_672), ("L", 326_155_272), ("XL", 753_754_888)])
def test_parameters_of_the_released_sizes(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        teacher = ARTransformer(ARConfig(**AR_PRESETS[preset].config()))
        student = ARStudent(ARStudentConfig(**AR_PRESETS[preset].config(latent_dim=8)))
    assert sum(parameter.numel() for parameter in student.parameters()) == parameters
    assert sum(parameter.numel() for parameter in teacher.parameters()) > parameters
