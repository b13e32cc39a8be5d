"""The road from a condition to pixels through a next-scale model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from arimg.accel.scale import scale_inputs
from arimg.control.adapter import ControlAdapter
from arimg.errors import CheckpointError, InputError
from arimg.models.base import Condition
from arimg.pipeline import Pipeline
from tests.toy import CONTROL, SIDE, toy_pipeline
from tests.toy_scales import LENGTH, SCALES, toy_scales_pipeline, toy_tokenizer

RAMP = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
FLAT = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
ENDS = (0, 1, 5, LENGTH)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return toy_scales_pipeline(torch.float64)


def codes(pipe: Pipeline, **options: Any) -> torch.Tensor:
    return pipe(**{"class_id": 1, "n": 4, **options}).codes


def test_the_models_own_decoder_paints_it_in_one_pass_per_scale(pipe: Pipeline) -> None:
    out = pipe(RAMP, class_id=1, n=2)
    assert out.codes.shape == (2, LENGTH) and out.latents.shape[2:] == SCALES[-1]
    assert out.images[0].size == (SIDE, SIDE) and out.stats.forward_passes == len(SCALES)
    assert out.stats.extra["guarantee"] == "same-codes"
    painted = pipe.tokenizer.decode(out.latents)
    torch.testing.assert_close(painted, pipe.tokenizer.decode_codes(out.codes, SCALES[-1]))
    assert torch.equal(pipe(RAMP, class_id=1, n=2, output_type="latent").images, out.latents)


def test_control_moves_the_codes_as_its_strength_says(pipe: Pipeline) -> None:
    free = codes(pipe)
    assert torch.equal(codes(pipe, control=RAMP, control_scale=0.0), free)
    assert not torch.equal(codes(pipe, control=RAMP), free)
    assert not torch.equal(codes(pipe, control=RAMP), codes(pipe, control=FLAT))
    assert not torch.equal(codes(pipe, control=RAMP, control_cfg=6.0), codes(pipe, control=RAMP))
    both = codes(pipe, control=[RAMP, FLAT], control_scale=[1.0, 0.0])
    assert torch.equal(both, codes(pipe, control=RAMP))


def test_a_control_that_starts_late_leaves_the_coarse_scales_alone(pipe: Pipeline) -> None:
    free, late = codes(pipe), codes(pipe, control=RAMP, control_start=2 / 3)
    assert torch.equal(late[:, :ENDS[2]], free[:, :ENDS[2]]) and not torch.equal(late, free)
    early = codes(pipe, control=RAMP, control_end=2 / 3)
    assert torch.equal(early[:, :ENDS[2]], codes(pipe, control=RAMP)[:, :ENDS[2]])


def test_a_picture_is_grown_from_its_first_scales(pipe: Pipeline) -> None:
    whole = pipe(RAMP, class_id=1, n=2)
    forced = torch.full((2, LENGTH), -1)
    forced[:, :ENDS[2]] = whole.codes[:, :ENDS[2]]
    again = pipe(RAMP, class_id=1, n=2, forced=forced)
    assert torch.equal(again.codes, whole.codes) and again.stats.forward_passes == 2
    with pytest.raises(InputError, match=rf"shape \(2, {LENGTH}\)"):
        pipe(RAMP, class_id=1, n=2, forced=forced[:, :16])


def test_soft_choices_paint_their_own_latents(pipe: Pipeline) -> None:
    out = pipe(RAMP, class_id=1, decoder="scale-smooth", lossy=True)
    hard = pipe.tokenizer.decode_codes(out.codes, SCALES[-1])
    assert not torch.allclose(pipe.tokenizer.decode(out.latents), hard)
    assert torch.equal(pipe(RAMP, class_id=1, decoder="scale-smooth", lossy=True).latents, out.latents)


def test_the_audit_scores_all_scales(pipe: Pipeline) -> None:
    report = pipe(RAMP, class_id=1, n=8, audit=True).stats.extra["audit"]
    assert report.tokens == 8 * LENGTH and report.lawful


def test_a_folder_paints_the_same(tmp_path: Path) -> None:
    pipe = toy_scales_pipeline()
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "toy"), dtype="float32")
    assert again.settings.decoder == "scale"
    assert torch.equal(codes(again, control=RAMP), codes(pipe, control=RAMP))


def test_another_size_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=f"end at {SIDE}x{SIDE} pixels; give --size {SIDE}x{SIDE}"):
        pipe(class_id=1, size=(SIDE, 2 * SIDE))


def test_decoders_are_offered_by_the_models_order(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="jacobi paints token by token, but this model scale by scale; use scale$"):
        pipe(class_id=1, decoder="jacobi")
    with pytest.raises(InputError, match="scale paints scale by scale, but this model token by token; use ar or"):
        toy_pipeline()(class_id=1, decoder="scale")


def test_parts_must_have_the_same_scales() -> None:
    one, several = toy_pipeline(), toy_scales_pipeline()
    for tokenizer, transformer in ((one.tokenizer, several.transformer), (several.tokenizer, one.transformer)):
        with pytest.raises(CheckpointError, match="one scale"):
            Pipeline(tokenizer, transformer)
    with pytest.raises(CheckpointError, match="scales 1x1, 4x4"):
        toy_scales_pipeline(scales=((1, 1), (4, 4)))
    assert Pipeline(toy_tokenizer(), several.transformer).control is None


def test_several_points_and_a_wider_patch_fit_too() -> None:
    pipe = toy_scales_pipeline(control=replace(CONTROL, points=2, patch=8), inject_layers=(0, 2))
    assert not torch.equal(codes(pipe, control=RAMP), codes(pipe))


def test_control_is_learnt_cell_by_cell() -> None:
    """Codes of the finest scale that tell whether their cell of the map is white, at random; after some steps, sampled
    codes follow the map, and not a shuffled one."""
    pipe = toy_scales_pipeline(control=replace(CONTROL, embed_dim=24), drop_path=0.0)
    networks = torch.nn.ModuleList([pipe.transformer, pipe.control])
    pipe.control.load_state_dict(ControlAdapter(pipe.control.config).state_dict())
    optimizer = torch.optim.AdamW(networks.parameters(), lr=5e-3)
    generator, classes = torch.Generator().manual_seed(0), Condition(class_ids_B=torch.zeros(16, dtype=torch.int64))
    space = pipe.tokenizer.space()
    for _ in range(50):
        maps, codes_BL = checkerboards(16, generator)
        inject = pipe.control.inject(maps, scales=SCALES)
        logits = pipe.transformer(scale_inputs(space.codebook_VC[codes_BL], space), classes, inject)
        optimizer.zero_grad()
        F.cross_entropy(logits.mT, codes_BL).backward()
        optimizer.step()
    maps, codes_BL = checkerboards(16, generator)
    painted = pipe(maps, class_id=0, cfg=1.0, size=(SIDE, SIDE)).codes
    assert float((painted == codes_BL).float().mean()) > 0.95
    assert float((painted == codes_BL.roll(1, 0))[:, ENDS[2]:].float().mean()) < 0.7


def checkerboards(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps with random black and white cells, and codes_BL: 0 on the coarse scales, then 1 or 2."""
    white = torch.randint(0, 2, (batch, 4, 4), generator=generator)
    maps = white.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1) * 2.0 - 1
    return maps, torch.cat([torch.zeros(batch, ENDS[2], dtype=torch.int64), 1 + white.flatten(1)], dim=1)
