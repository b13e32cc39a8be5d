"""The pipeline object at toy size: what goes in, what comes out, and what a picture may depend on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from arimg import Pipeline
from arimg.accel.base import GUIDANCE_ORDERS, StepInfo
from arimg.accel.target import Target, branch_scales
from arimg.call import DIFFUSERS_NAMES, call_options
from arimg.control.adapter import ControlConfig
from arimg.errors import ArimgError, CheckpointError, InputError, UnknownNameError
from arimg.models.base import Condition
from tests.toy import CLASSES, CONTROL, SIDE, toy_folder, toy_pipeline

LENGTH = 16


def line(box: tuple[int, int, int, int], size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A white line on black."""
    picture = Image.new("RGB", size[::-1])
    ImageDraw.Draw(picture).line(box, fill=(255, 255, 255), width=2)
    return picture


MAP, OTHER = line((0, 0, 15, 15)), line((15, 0, 0, 15))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return toy_pipeline(torch.float64)


def codes(pipe: Pipeline, **options: Any) -> list[list[int]]:
    out: list[list[int]] = pipe(**options).codes.tolist()
    return out


def first_logits(pipe: Pipeline, **options: Any) -> Tensor:
    """Guided logits_BLV under teacher forcing with fixed codes: what a call samples from, position by position."""
    request, _ = pipe._request(call_options(options, pipe.settings))
    target = Target(pipe.transformer, request)
    fixed_BL = (torch.arange(request.length) * 7 % 64).expand(len(request.seeds_B), -1)
    positions_BL = torch.arange(request.length).expand(len(request.seeds_B), -1)
    with torch.no_grad():
        return torch.cat([target.start_logits(), target.step_logits(fixed_BL[:, :-1], positions_BL[:, :-1])], dim=1)


def touched(a_BLV: Tensor, b_BLV: Tensor) -> list[int]:
    """Positions at which two laws differ by more than the rounding of batches of different shapes."""
    return ((a_BLV - b_BLV).abs() > 1e-9).any(-1).any(0).nonzero().flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, counts, independence (A6)


def test_picture_k_has_seed_plus_k(pipe: Pipeline) -> None:
    out = pipe(MAP, class_name="dog", seed=5, n=3)
    assert out.seeds == (5, 6, 7) and len(out.images) == 3
    assert out.codes.tolist() == codes(pipe, control=MAP, class_name="dog", seeds=[5, 6, 7])
    assert len({tuple(row) for row in out.codes.tolist()}) == 3


def test_codes_of_a_sample_depend_on_its_seed_and_condition_only(pipe: Pipeline) -> None:
    seeds = [3, 1, 4, 15, 9, 2, 6, 5]
    batch = codes(pipe, control=MAP, class_name="cat", seeds=seeds)
    backwards = codes(pipe, control=MAP, class_name="cat", seeds=seeds[::-1])
    pipe(OTHER, class_name="dog", n=2, cfg=4.0)
    alone = [codes(pipe, control=MAP, class_name="cat", seed=seed)[0] for seed in seeds]
    assert alone == batch == backwards[::-1]


def test_other_conditions_in_the_batch_do_not_matter(pipe: Pipeline) -> None:
    maps = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in (MAP, OTHER)])
    both = codes(pipe, control=maps, class_name=["cat", "dog"], seeds=[8, 9])
    assert both == (codes(pipe, control=MAP, class_name="cat", seed=8)
                    + codes(pipe, control=OTHER, class_name="dog", seed=9))


def test_one_picture_or_n_for_each_class(pipe: Pipeline) -> None:
    out = pipe(class_id=[0, 2], n=2)
    assert out.seeds == (0, 1, 2, 3)
    assert out.codes.tolist() == codes(pipe, class_id=0, seeds=[0, 1]) + codes(pipe, class_id=2, seeds=[2, 3])


@pytest.mark.parametrize(("options", "message"), [
    ({"n": 0}, "n is 0; ask for 1 to 1024"),
    ({"seed": -1}, "seed -1: a seed is a whole number"),
    ({"seed": 1.5}, "seed 1.5: a seed is a whole number"),
    ({"seeds": []}, "0 seeds for 1 pictures"),
    ({"seeds": [1, 2], "n": 3}, "2 seeds for 3 pictures"),
    ({"seed": 1, "seeds": [1]}, "seed and seeds exclude each other"),
    ({"steps": 0}, "steps is 0"),
    ({"class_name": []}, "list of classes or prompts is empty"),
    ({"class_id": [0, 1], "control": torch.zeros(3, 3, SIDE, SIDE)}, "for 3 pictures; give 1, or one for each"),
])
def test_counts_that_cannot_be(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_class_names_ids_and_synonyms(pipe: Pipeline) -> None:
    by_id = codes(pipe, class_id=2)
    for name in ("goldfish", "Carassius auratus", "GOLDFISH, carassius auratus", "2", 2):
        assert codes(pipe, class_name=name) == by_id
    assert codes(pipe, class_name="dog") != by_id


def test_no_class_is_the_null_class(pipe: Pipeline) -> None:
    null = pipe.transformer.null(Condition(class_ids_B=torch.tensor([0])))
    assert null.class_ids_B.tolist() == [len(CLASSES)]
    request, _ = pipe._request(call_options({}, pipe.settings))
    assert request.condition.class_ids_B.tolist() == [len(CLASSES)]


def test_without_a_class_guidance_acts_on_the_control_only(pipe: Pipeline) -> None:
    assert not touched(first_logits(pipe, cfg=1.0), first_logits(pipe, cfg=4.0))
    assert touched(first_logits(pipe, control=MAP, cfg=1.0), first_logits(pipe, control=MAP, cfg=4.0))


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"class_name": "dgo"}, UnknownNameError, "unknown class 'dgo'; did you mean dog"),
    ({"class_id": 3}, InputError, "class 3: the ids of this model are 0 to 2"),
    ({"class_id": -1}, InputError, "class -1"),
    ({"prompt": "a cat"}, InputError, "a prompt is given, but this model knows classes"),
    ({"class_name": "cat", "class_id": 0}, InputError, "class_name and class_id exclude each other"),
])
def test_classes_that_cannot_be(pipe: Pipeline, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(**options)


def test_a_model_without_class_names_takes_ids(pipe: Pipeline) -> None:
    nameless = Pipeline(pipe.tokenizer, pipe.transformer)
    with pytest.raises(InputError, match="class 'cat': this model has no class names; give an id from 0 to 2"):
        nameless(class_name="cat", size=(SIDE, SIDE))


# ---------------------------------------------------------------------------------------------------------------------
# Controls (A5)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_strength_zero_is_no_control_bit_for_bit(pipe: Pipeline, cfg: float) -> None:
    off = {"class_name": "dog", "cfg": cfg}
    assert torch.equal(first_logits(pipe, control=MAP, control_scale=0.0, **off), first_logits(pipe, **off))
    assert codes(pipe, control=MAP, control_scale=0.0, n=2, **off) == codes(pipe, n=2, **off)


def test_strength_works_without_guidance(pipe: Pipeline) -> None:
    """ControlAR, defect 13: strength was ignored at cfg <= 1."""
    full, half = (first_logits(pipe, control=MAP, control_scale=scale, cfg=1.0) for scale in (1.0, 0.5))
    assert touched(full, half)[0] == 0


def test_two_controls_add_up(pipe: Pipeline) -> None:
    one, two = first_logits(pipe, control=MAP), first_logits(pipe, control=[MAP, OTHER])
    assert touched(one, two)
    assert torch.equal(one, first_logits(pipe, control=[MAP, OTHER], control_scale=[1.0, 0.0]))
    halves = first_logits(pipe, control=[MAP, MAP], control_scale=[0.25, 0.75])
    assert torch.allclose(one, halves, atol=1e-10)


@pytest.mark.parametrize(("start", "end", "first", "stop"), [(0.5, 1.0, 8, 16), (0.0, 0.25, 0, 4), (0.25, 0.75, 4, 12)])
def test_start_and_end_bound_where_the_control_is_added(pipe: Pipeline, start: float, end: float, first: int,
                                                        stop: int) -> None:
    window = {"control": MAP, "control_start": start, "control_end": end}
    request, _ = pipe._request(call_options(window, pipe.settings))
    assert request.inject_KBLD is not None
    added = request.inject_KBLD.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    assert added == list(range(first, stop))
    changed = touched(first_logits(pipe, **window), first_logits(pipe))
    assert changed == list(range(first, LENGTH))            # later tokens read the earlier ones


def test_each_control_has_its_own_window(pipe: Pipeline) -> None:
    two = first_logits(pipe, control=[MAP, OTHER], control_end=[1.0, 0.5], control_start=[0.0, 0.25])
    assert touched(two, first_logits(pipe, control=MAP)) == list(range(4, LENGTH))


def test_control_guidance_is_a_third_branch(pipe: Pipeline) -> None:
    logits = {cfg: first_logits(pipe, control=MAP, class_name="dog", cfg=cfg, control_cfg=2.0) for cfg in (1.0, 3.0)}
    full = first_logits(pipe, control=MAP, class_name="dog", cfg=1.0)
    alone = first_logits(pipe, class_name="dog", cfg=1.0)
    null = first_logits(pipe, cfg=1.0)
    assert torch.allclose(logits[1.0], alone + 2.0 * (full - alone), atol=1e-9)
    assert torch.allclose(logits[3.0], null + 3.0 * (alone - null) + 2.0 * (full - alone), atol=1e-9)


def test_control_first_compares_the_class_along_the_control(pipe: Pipeline) -> None:
    scales = {"cfg": 3.0, "control_cfg": 2.0}
    got = first_logits(pipe, control=MAP, class_name="dog", guidance_order="control-first", **scales)
    full, lines, null = (first_logits(pipe, cfg=1.0, **given) for given in (
        {"control": MAP, "class_name": "dog"}, {"control": MAP}, {}))
    assert torch.allclose(got, null + 2.0 * (lines - null) + 3.0 * (full - lines), atol=1e-9)


def test_without_a_class_only_the_control_is_guided(pipe: Pipeline) -> None:
    lines, null = (first_logits(pipe, cfg=1.0, **given) for given in ({"control": MAP}, {}))
    for order in GUIDANCE_ORDERS:
        got = first_logits(pipe, control=MAP, guidance_order=order, cfg=3.0, control_cfg=2.0)
        assert torch.allclose(got, null + 2.0 * (lines - null), atol=1e-9)
        request, _ = pipe._request(call_options({"control": MAP, "cfg": 3.0, "control_cfg": 2.0}, pipe.settings))
        assert list(branch_scales(request.guidance, True)) == ["full", "null"]
    assert torch.equal(first_logits(pipe, cfg=3.0), null)


def test_order_and_plausibility_of_guidance_are_the_models_own() -> None:
    own = toy_pipeline(torch.float64)
    own.settings = replace(own.settings, guidance_order="control-first", plausibility=0.5)
    call = {"control": MAP, "class_name": "dog", "cfg": 3.0, "control_cfg": 2.0}
    plain = toy_pipeline(torch.float64)
    assert codes(own, **call) == codes(plain, **call, guidance_order="control-first", plausibility=0.5)
    assert codes(own, **call) != codes(plain, **call)
    assert codes(own, **call, guidance_order="class-first", plausibility=0.0) == codes(plain, **call)


def test_guidance_interval(pipe: Pipeline) -> None:
    inside = first_logits(pipe, control=MAP, cfg=3.0, cfg_interval=(4, 8))
    assert touched(inside, first_logits(pipe, control=MAP, cfg=1.0)) == [4, 5, 6, 7]


@pytest.mark.parametrize("rope_grid", ["true", "table"])
def test_96x160(rope_grid: str) -> None:
    pipe = toy_pipeline(torch.float64, rope_grid=rope_grid, levels=5)
    options = {"control": line((0, 0, 159, 95), (96, 160)), "size": (96, 160), "class_name": "cat"}
    out = pipe(**options)
    assert out.images[0].size == (160, 96) and out.codes.shape == (1, 6 * 10)
    laws = first_logits(pipe, **options)
    assert touched(laws, first_logits(pipe, **options, control_start=0.5)) == list(range(60))
    assert touched(laws, first_logits(pipe, **options, control_end=0.5)) == list(range(30, 60))


def test_defect_21_a_call_inside_a_call(pipe: Pipeline) -> None:
    """ControlAR kept the control and its strength on the module, so that a second call changed a running first one."""
    inner: list[list[int]] = []

    def other_call(info: StepInfo) -> None:
        if info.forward_pass == 8:
            inner.extend(codes(pipe, control=OTHER, class_name="dog", control_scale=0.5, cfg=4.0))

    outer = codes(pipe, control=MAP, class_name="cat", on_step=other_call)
    assert outer == codes(pipe, control=MAP, class_name="cat")
    assert inner == codes(pipe, control=OTHER, class_name="dog", control_scale=0.5, cfg=4.0) != outer


def test_rotary_options_differ_on_wide_pictures() -> None:
    true, table = (toy_pipeline(torch.float64, rope_grid=kind) for kind in ("true", "table"))      # a table 8 wide
    assert not touched(*(first_logits(pipe, size=(SIDE, 32)) for pipe in (true, table)))
    assert touched(*(first_logits(pipe, size=(SIDE, 24)) for pipe in (true, table)))[0] > 6


def test_a_control_of_another_shape_is_fitted_with_a_notice(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    wide = line((0, 0, 63, 31), (32, 64))
    with caplog.at_level(logging.WARNING, "arimg"):
        out = pipe(wide)
    assert "control image 32x64 fitted to 16x16 (resize pad)" in caplog.text
    fitted_HW = out.maps[0][0, 0]
    assert fitted_HW.shape == (SIDE, SIDE) and set(fitted_HW.unique().tolist()) == {-1.0, 1.0}      # canny: nearest
    assert (fitted_HW[:4] == -1).all() and (fitted_HW[12:] == -1).all()                             # its background
    assert not torch.equal(pipe(wide, resize="crop").maps[0], out.maps[0])


def test_a_control_that_fits_gives_no_notice(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "arimg"):
        pipe(MAP)
    assert not caplog.records


@pytest.mark.parametrize("resize", ["pad", "crop", "stretch"])
def test_control_from_a_photo(pipe: Pipeline, resize: str) -> None:
    photo = Image.new("RGB", (64, 32), (250, 250, 250))
    ImageDraw.Draw(photo).rectangle((20, 8, 44, 24), fill=(200, 30, 30))
    (map_13HW,) = pipe(control_from=photo, resize=resize).maps
    assert set(map_13HW.unique().tolist()) == {-1.0, 1.0}
    if resize == "pad":                                     # the border of the padding is no edge of the photo
        assert (map_13HW[..., :5, :] == -1).all() and (map_13HW[..., 11:, :] == -1).all()


def test_sources_of_a_control(pipe: Pipeline, tmp_path: Path) -> None:
    MAP.save(tmp_path / "map.png")
    tensor = torch.from_numpy(np.array(MAP)).permute(2, 0, 1) / 127.5 - 1
    expected = codes(pipe, control=MAP)
    for source in (str(tmp_path / "map.png"), tmp_path / "map.png", np.array(MAP), np.array(MAP.convert("L")), tensor):
        assert codes(pipe, control=source) == expected


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"control_type": "canyn"}, UnknownNameError, "unknown control type 'canyn'; did you mean canny"),
    ({"control_type": "depth"}, InputError, "control type 'depth': this model was trained on canny"),
    ({"control_type": ["canny", "canny"]}, InputError, "2 values of control_type for 1 control images"),
    ({"control_scale": [1.0, 2.0, 3.0]}, InputError, "3 values of control_scale for 1 control images"),
    ({"control_scale": float("nan")}, InputError, "--control-scale nan"),
    ({"control_start": 0.6, "control_end": 0.4}, InputError, "--control-start 0.6 --control-end 0.4"),
    ({"control_end": 1.5}, InputError, "0 <= start < end <= 1"),
    ({"resize": "squeeze"}, UnknownNameError, "unknown resize mode 'squeeze'"),
    ({"control": torch.zeros(3, 8, 8)}, InputError, "of shape \\(3, 16, 16\\)"),
    ({"control": np.zeros((4, 4), np.float32)}, InputError, "array of float32"),
    ({"control": None, "control_type": "canny"}, InputError, "without a control image"),
])
def test_controls_that_cannot_be(pipe: Pipeline, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(**{"control": MAP, **options})


def test_a_model_without_control() -> None:
    with pytest.raises(InputError, match="no control component"):
        toy_pipeline(control=None, inject_layers=())(MAP)


def test_a_model_of_several_types(caplog: pytest.LogCaptureFixture) -> None:
    pipe = toy_pipeline(control=ControlConfig(**{**CONTROL.__dict__, "types": ("canny", "depth")}))
    assert codes(pipe, control=MAP, control_type="canny") != codes(pipe, control=MAP, control_type="depth")
    with caplog.at_level(logging.WARNING, "arimg"):
        assert codes(pipe, control=MAP) == codes(pipe, control=MAP, control_type="canny")
    assert "control type not given: the image is read as canny (of canny, depth)" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, laws, given codes


def test_size_must_be_a_multiple_of_the_stride(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="size 15x18: both sides must be multiples of 4; the nearest is 16x16"):
        pipe(size=(15, 18))
    with pytest.raises(InputError, match="size 400000x400000: more than the limit"):
        pipe(size=(400000, 400000))


def test_an_untrained_size_is_a_warning(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "arimg"):
        out = pipe(size=(8, 20))
    assert out.images[0].size == (20, 8)
    assert "size 8x20: the model was trained at 16x16" in caplog.text


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1.0}, "--temperature -1.0"), ({"temperature": float("nan")}, "--temperature nan"),
    ({"top_p": 2.0}, "--top-p 2.0"), ({"top_k": -3}, "--top-k -3"), ({"cfg": float("nan")}, "--cfg nan"),
    ({"control_cfg": -1.0}, "--control-cfg -1.0"), ({"cfg_interval": (5, 2)}, "--cfg-interval 5:2"),
    ({"decoder": "jacoby"}, "unknown decoder 'jacoby'"), ({"output_type": "gif"}, "unknown output type 'gif'"),
])
def test_values_out_of_range(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArimgError, match=message):
        pipe(**options)


def test_forced_codes_are_kept(pipe: Pipeline) -> None:
    forced = torch.full((LENGTH,), -1)
    forced[3:6] = torch.tensor([7, 8, 9])
    out = pipe(MAP, forced=forced, n=2)
    assert out.codes[:, 3:6].tolist() == [[7, 8, 9]] * 2
    free = pipe(MAP, n=2)
    assert torch.equal(out.codes[:, :3], free.codes[:, :3])


@pytest.mark.parametrize(("forced", "message"), [
    (torch.zeros(5, dtype=torch.int64), "give whole numbers of shape"),
    (torch.zeros(LENGTH), "forced is torch.float32"),
    (torch.full((LENGTH,), 64), "forced holds codes from 64 to 64"),
])
def test_forced_codes_that_cannot_be(pipe: Pipeline, forced: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(forced=forced)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_output_types(pipe: Pipeline) -> None:
    out = pipe(MAP, n=2)
    pil, array, tensor = out.images, *(pipe(MAP, n=2, output_type=kind).images for kind in ("np", "pt"))
    assert array.shape == (2, SIDE, SIDE, 3) and tensor.shape == (2, 3, SIDE, SIDE)
    assert 0 <= array.min() and array.max() <= 1
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.array(pil[1]) / 255 - array[1]).max() <= 0.6 / 255
    latent = pipe(MAP, n=2, output_type="latent").images
    assert torch.equal(latent, out.latents) and latent.shape == (2, 4, 4, 4)
    assert torch.equal(latent[1, :, 2, 3], pipe.tokenizer.space().codebook_VC[out.codes[1, 11]])


def test_result(pipe: Pipeline) -> None:
    out = pipe(MAP, n=2)
    assert out[0] is out.images
    assert out.stats.forward_passes == LENGTH and set(out.stats.seconds) == {"control", "tokens", "pixels"}
    images, = pipe(MAP, return_dict=False)
    assert isinstance(images[0], Image.Image)


def test_callbacks(pipe: Pipeline) -> None:
    ours: list[StepInfo] = []
    theirs: list[tuple[Any, ...]] = []
    pipe(MAP, n=2, on_step=ours.append, callback_on_step_end=lambda *given: theirs.append(given))
    assert [info.fixed_tokens for info in ours] == [2 * j for j in range(1, LENGTH + 1)]
    assert [step for _, step, _, _ in theirs] == list(range(LENGTH))
    assert theirs[0][0] is pipe and theirs[-1][3]["codes"].shape == (2, LENGTH)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers names


@pytest.mark.parametrize(("diffusers", "ours"), [
    ({"guidance_scale": 4.0}, {"cfg": 4.0}), ({"controlnet_conditioning_scale": 0.5}, {"control_scale": 0.5}),
    ({"control_guidance_start": 0.5}, {"control_start": 0.5}), ({"control_guidance_end": 0.5}, {"control_end": 0.5}),
    ({"class_labels": [1, 2]}, {"class_id": [1, 2]}), ({"num_images_per_prompt": 2}, {"n": 2}),
    ({"height": 8}, {"size": (8, 16)}), ({"height": 8, "width": 20}, {"size": (8, 20)}),
    ({"generator": torch.Generator().manual_seed(11), "n": 2}, {"seeds": [11, 12]}),
    ({"generator": [torch.Generator().manual_seed(s) for s in (4, 2)]}, {"seeds": [4, 2]}),
])
def test_diffusers_names(pipe: Pipeline, diffusers: dict[str, Any], ours: dict[str, Any]) -> None:
    assert codes(pipe, control=MAP, **diffusers) == codes(pipe, control=MAP, **ours)


@pytest.mark.parametrize("alias", sorted(DIFFUSERS_NAMES))
def test_a_name_and_its_alias_at_once(pipe: Pipeline, alias: str) -> None:
    with pytest.raises(InputError, match=f"{DIFFUSERS_NAMES[alias]} and its diffusers name {alias} are both given"):
        pipe(**{alias: 1, DIFFUSERS_NAMES[alias]: 1})


def test_a_name_that_is_no_option(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="no option 'guidance_scal'; did you mean guidance_scale"):
        pipe(guidance_scal=2.0)


# ---------------------------------------------------------------------------------------------------------------------
# Folders, devices, dtypes


def test_round_trip(pipe: Pipeline, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "toy")
    again = Pipeline.from_pretrained(folder, dtype="float64")
    assert again.settings == pipe.settings and again.control_types == ("canny",)
    assert codes(again, control=MAP, n=2) == codes(pipe, control=MAP, n=2)


def test_dtypes(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "toy")
    pipe = Pipeline.from_pretrained(folder, device="cpu", dtype="bf16")
    assert pipe.dtype == torch.bfloat16 and next(pipe.tokenizer.parameters()).dtype == torch.float32
    out = pipe(MAP)
    assert out.codes.shape == (1, LENGTH) and out.stats.extra["guarantee"] == "tolerance"
    assert Pipeline.from_pretrained(folder, device="cpu").dtype == torch.float32
    assert pipe.to("cpu", torch.float64).dtype == next(pipe.tokenizer.parameters()).dtype == torch.float64
    with pytest.raises(UnknownNameError, match="unknown dtype 'fp15'; did you mean"):
        Pipeline.from_pretrained(folder, dtype="fp15")
    with pytest.raises(InputError, match="device 'gpu' cannot be used here"):
        Pipeline.from_pretrained(folder, device="gpu")


def test_parts_of_different_models(pipe: Pipeline) -> None:
    other = toy_pipeline(dim=96, control=None)
    with pytest.raises(CheckpointError, match="width: 48 in the control component, 96 in the others"):
        Pipeline(other.tokenizer, other.transformer, pipe.control)
    with pytest.raises(CheckpointError, match="the tokenizer has 64 codes, the transformer 128"):
        toy_pipeline(vocab_size=128)
