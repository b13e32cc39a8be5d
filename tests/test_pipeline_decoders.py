"""Networks that single decoders need: in folders, in calls, on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from arimg import hub
from arimg.accel.dd1 import Dd1, Schedule
from arimg.accel.verify import FlowAR, FlowScales
from arimg.checkpoints import INDEX, read_index
from arimg.cli import main
from arimg.errors import CheckpointError, InputError
from arimg.models.students import ARStudent, ARStudentConfig
from arimg.pipeline import Pipeline
from tests.models.toy_continuous import nearby
from tests.test_walk import control_map
from tests.toy import toy_pipeline
from tests.toy_continuous import toy_continuous_pipeline
from tests.toy_decoders import with_students
from tests.toy_scales import toy_scales_pipeline

MODELS = {"raster": toy_pipeline, "scales": toy_scales_pipeline}
OPTIONS: dict[str, Any] = {"class_id": 1, "seed": 3, "n": 2, "lossy": True}


@pytest.fixture(scope="module", params=MODELS)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return with_students(MODELS[request.param](torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_students(toy_pipeline()).save_pretrained(tmp_path_factory.mktemp("models") / "toy")


def message(error: Any, function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_lists_them(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    assert content["decoders"] == {"dd1": ["arimg.hub", "ARStudent"], "dd2": ["arimg.hub", "ARGenerator"]}
    assert read_index(folder).second_networks == ("dd1", "dd2")
    again, written = Pipeline.from_pretrained(folder, dtype="float32"), with_students(toy_pipeline()).to("cpu")
    for decoder in ("dd1", "dd2"):
        ours, theirs = (one(decoder=decoder, control=control_map(), **OPTIONS) for one in (again, written))
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.latents, theirs.latents)


def test_only_the_wanted_ones_are_loaded(folder: Path) -> None:
    def loaded(*names: str) -> list[str]:
        return sorted(Pipeline.from_pretrained(folder, decoders=names).decoders)
    assert loaded() == loaded("jacobi") == [] and loaded("dd2") == ["dd2"]
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "settings": {**index["settings"], "decoder": "dd1"}}))
    assert loaded() == ["dd1"], "the model's own decoder"
    (folder / INDEX).write_text(json.dumps(index))


def test_diffusers_reads_and_writes_the_same_folder(folder: Path, tmp_path: Path) -> None:
    theirs = hub.ArimgPipeline.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "again")
    ours = Pipeline.from_pretrained(tmp_path / "again", dtype="float32")
    assert read_index(tmp_path / "again") == read_index(folder)
    codes = [one(decoder="dd1", **OPTIONS).codes for one in (theirs, ours, Pipeline.from_pretrained(folder))]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])
    assert type(hub.ARStudent.from_pretrained(folder / "decoders/dd1").backbone).__name__ == "LatentTransformer"


def test_steps_are_those_that_the_student_knows(pipe: Pipeline) -> None:
    one, two = (pipe(decoder="dd1", steps=steps, **OPTIONS) for steps in (1, 2))
    assert (one.stats.forward_passes, two.stats.forward_passes) == (1, 2)
    explicit = pipe(decoder=Dd1(pipe.decoders["dd1"], Schedule((0, 2))), **OPTIONS)
    assert torch.equal(two.codes, explicit.codes) and not torch.equal(two.codes, one.codes)
    assert torch.equal(pipe(decoder="dd1", **OPTIONS).codes, one.codes)
    assert "trained for 2 (timesteps 0, 2" in message(InputError, pipe, decoder="dd1", steps=3, **OPTIONS)


def test_further_steps_of_a_generator_are_the_teachers(pipe: Pipeline) -> None:
    one, three = (pipe(decoder="dd2", steps=steps, **OPTIONS) for steps in (1, 3))
    units = 3 if pipe.settings.decoder == "scale" else 16
    kept = 1 if units == 3 else 14
    assert one.stats.forward_passes == 1 and torch.equal(one.codes[:, :kept], three.codes[:, :kept])
    assert not torch.equal(one.codes, three.codes)
    assert f"this picture has {units} units" in message(InputError, pipe, decoder="dd2", steps=units + 1, **OPTIONS)


@pytest.mark.parametrize("decoder", ["dd1", "dd2"])
def test_verified_codes_are_the_models_own(pipe: Pipeline, decoder: str) -> None:
    options = {**OPTIONS, "control": control_map(), "lossy": False}
    oracle = FlowScales() if pipe.settings.decoder == "scale" else FlowAR()
    verified = pipe(decoder=decoder, verify=True, **options)
    assert torch.equal(verified.codes, pipe(decoder=oracle, **options).codes)
    extra = verified.stats.extra
    assert extra["guarantee"] == "tolerance" and extra["draft_passes"] == 1
    assert 0 <= extra["draft_agreement"] <= 1 and verified.stats.seconds["tokens"] > 0


def test_a_missing_network_is_named() -> None:
    raster, continuous = toy_pipeline(), toy_continuous_pipeline("causal")
    for pipe, decoder, key, instead in ((raster, "dd1", "dd1", "ar or jacobi"), (raster, "dd2", "dd2", "ar or jacobi"),
                                        (continuous, "cspd", "cspd", "jacobi-continuous")):
        line = message(InputError, pipe, class_id=1, decoder=decoder, lossy=True)
        assert f"this model has no decoders/{key}" in line and f'pipe.decoders["{key}"] = network' in line
        assert instead in line.rpartition("or use")[2] and "cspd" not in line.rpartition("or use")[2]
    assert "paints token by token or scale by scale, but this model continuous tokens" in message(
        InputError, continuous, class_id=1, decoder="dd1", lossy=True)


def test_misuse(pipe: Pipeline) -> None:
    given = {**OPTIONS, "lossy": False}
    assert "add --verify (verify=True) to get the model's own picture, --lossy" in message(
        InputError, pipe, decoder="dd1", **given)
    own = pipe.settings.decoder
    assert "guesses nothing" in message(InputError, pipe, decoder=own, verify=True, **given)
    assert "dd1 has no window" in message(InputError, pipe, decoder="dd1", window=4, **OPTIONS)
    if own == "scale":
        assert "verified all at once" in message(InputError, pipe, decoder="dd1", window=4, verify=True, **given)


def test_networks_of_other_models_are_refused(pipe: Pipeline) -> None:
    scales = pipe.settings.decoder == "scale"
    other = with_students((toy_pipeline if scales else toy_scales_pipeline)())
    parts = {"tokenizer": pipe.tokenizer, "transformer": pipe.transformer, "control": pipe.control}
    line = message(CheckpointError, Pipeline, **parts, decoders=other.decoders)
    assert "which is for other models than" in line and "decoders/dd1" in line
    if not scales:
        config = pipe.decoders["dd1"].config
        for field, value, fault in (("vocab_size", 65, "codes: 65"), ("latent_dim", 5, "channels of a code: 5"),
                                    ("inject_layers", (), "injection points: 3 in the control component, 0 in")):
            student = ARStudent(ARStudentConfig(**{**vars(config), field: value}))
            assert fault in message(CheckpointError, Pipeline, **parts, decoders={"dd1": student})


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    damaged = pipe.save_pretrained(tmp_path / "toy")
    index = json.loads((damaged / INDEX).read_text())
    for entry in (["arimg.hub", "ARStudent"], {"../dd1": ["arimg.hub", "ARStudent"]}, {"dd1": ["os", "system"]},
                  {"dd1": "ARStudent"}):
        (damaged / INDEX).write_text(json.dumps({**index, "decoders": entry}))
        message(CheckpointError, Pipeline.from_pretrained, damaged)
    (damaged / INDEX).write_text(json.dumps({**index, "decoders": {"dd3": ["arimg.hub", "ARStudent"]}}))
    assert "decoders/dd3" in message(CheckpointError, Pipeline.from_pretrained, damaged)


def test_speculation_by_name(tmp_path: Path) -> None:
    pipe = toy_continuous_pipeline("causal")
    pipe.decoders = {"cspd": nearby(pipe.transformer)}
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "toy"), dtype="float32")
    out = again(class_id=1, decoder="cspd", window=2, seed=1)
    assert out.stats.extra["guarantee"] == "same-law" and out.stats.extra["draft_passes"] > 0


def test_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    control_map().save("map.png")
    base = ["sample", "--model", str(folder), "--control", "map.png", "--class", "dog", "--dtype", "float32"]

    def figures(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(main, [*base, *arguments, "--json", "out.json"])
        assert result.exit_code == 0, (result.stderr, result.exception)
        read: dict[str, Any] = json.loads(Path("out.json").read_text())
        return read
    assert figures("--decoder", "dd1", "--lossy")["forward_passes"] == 1
    assert figures("--decoder", "dd1", "--steps", "2", "--lossy")["forward_passes"] == 2
    verified = figures("--decoder", "dd1", "--verify")
    assert verified["guarantee"] == "tolerance" and verified["options"]["verify"] is True
    assert verified["figures"]["draft_passes"] == 1
    assert verified["figures"]["draft_passes"] + verified["figures"]["teacher_passes"] == verified["forward_passes"]
    again = CliRunner().invoke(main, ["sample", "--from", "out.png", "--model", str(folder), "-o", "again.png"])
    assert again.exit_code == 0, again.stderr
    refused = CliRunner().invoke(main, [*base, "--decoder", "dd1"])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and "--verify" in refused.stderr


def test_the_list_of_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import arimg.checkpoints as checkpoints

    info = checkpoints.ModelInfo("toy", folder, read_index(folder).settings, 1, read_index(folder).second_networks)
    monkeypatch.setattr(checkpoints, "list_models", lambda: [replace(info)])
    assert "decoders  ar, dd1, dd2" in CliRunner().invoke(main, ["models"]).stdout
