"""Students of Distilled Decoding in the layouts in which they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arimg.accel.dd1 import Dd1, Schedule
from arimg.errors import CheckpointError, InputError
from arimg.interop.convert import convert
from arimg.interop.dd1 import infer_ar_student_config, infer_var_student_config, student_from_dd
from arimg.interop.files import read_original
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.models.students import ARStudent, ARStudentConfig
from arimg.models.var_students import VARStudent, VARStudentConfig
from arimg.pipeline import Pipeline
from arimg.presets import AR_PRESETS
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from tests.parity.fixture import Fixture, load

PARITY = Path(__file__).parents[1] / "data" / "parity"
LAYOUTS: dict[str, Any] = json.loads((PARITY / "var_dd_state_dicts.json").read_text())["models"]


def layout(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file."""
    keys = {}
    for key, shape, *count in LAYOUTS[name]["keys"]:
        for i in range(count[0] if count else 1):
            keys[key.replace("{i}", str(i))] = tuple(shape)
    return keys


def empty(name: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in layout(name).items()}


def same_layout(student: nn.Module, state: dict[str, Tensor]) -> bool:
    own = {key: tuple(tensor.shape) for key, tensor in student.state_dict().items()}
    return own == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("preset", ["B", "L", "XL"])
def test_released_llamagen_students_fit(preset: str) -> None:
    state = empty(f"dd1_llamagen_{preset}")
    config = ARStudentConfig(**infer_ar_student_config(state))
    assert (config.heads, config.layers) == (AR_PRESETS[preset].heads, AR_PRESETS[preset].layers)
    with torch.device("meta"):
        student = ARStudent(config)
    assert same_layout(student, student_from_dd(state))


@pytest.mark.parametrize("depth", [16, 20, 24])
def test_released_var_students_fit(depth: int) -> None:
    state = empty(f"dd1_var_d{depth}")
    del state["lvl_1L"]                 # its values are not in the table of layouts
    config = VARStudentConfig(**infer_var_student_config(state))
    assert (config.dim, config.heads, len(config.scales)) == (64 * depth, depth, 10)
    with torch.device("meta"):
        student = VARStudent(config)
    assert same_layout(student, student_from_dd(state))


@torch.no_grad()
def test_var_student_that_reads_the_noise_data_embedding_as_it_is() -> None:
    config = VARStudentConfig(vocab_size=5, codebook_dim=2, scales=((1, 1), (2, 2)), dim=8, layers=2, heads=2,
                              num_classes=3)
    original = {key.removeprefix("backbone."): tensor for key, tensor in VARStudent(config).state_dict().items()
                if not key.startswith("layerwise_n_d_embed.")}
    student = VARStudent(config)
    student.load_state_dict(student_from_dd(original))
    for layer in student.layerwise_n_d_embed:
        assert torch.equal(layer(original["n_d_embed.weight"]), original["n_d_embed.weight"])


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return load(PARITY / "dd1_llamagen_student.safetensors")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, fixture: Fixture) -> list[Path]:
    """Files of a tokenizer and of a teacher that fit the fixture's student."""
    folder, config = tmp_path_factory.mktemp("originals"), fixture.spec["config"]
    vq = VQTokenizer(VQConfig(codebook_size=config["vocab_size"], codebook_dim=config["codebook_dim"],
                              base_channels=32, multipliers=(1, 1), res_blocks=1, z_channels=32))
    teacher = ARTransformer(ARConfig(vocab_size=config["vocab_size"], dim=config["dim"], layers=config["n_layer"],
                                     heads=config["n_head"], ffn_hidden=96, num_classes=config["num_classes"]))
    files = {"vq.pt": {"model": vq.state_dict()}, "teacher.pt": {"model": teacher.state_dict()}}
    for name, content in files.items():
        torch.save(content, folder / name)
    return [folder / name for name in files]


def assert_the_student_paints(pipe: Pipeline, timesteps: tuple[int, ...], **options: Any) -> None:
    """Through the one call that serves all decoders: one pass; more of them where it knows them; verified."""
    options = {"class_id": 1, "seed": 3, "decoder": "dd1", **options}
    own = pipe.decoders["dd1"].config
    assert (own.timesteps, own.split) == ((0,), None)
    with pytest.raises(InputError, match="--steps 2: this student was trained for 1"):
        pipe(**options, steps=2, lossy=True)
    assert pipe(**options, lossy=True).stats.forward_passes == 1
    two = pipe(**{**options, "decoder": Dd1(pipe.decoders["dd1"], Schedule(timesteps))}, lossy=True)
    assert two.stats.forward_passes == 2
    verified = pipe(**options, verify=True)
    assert verified.stats.extra["guarantee"] == "tolerance" and verified.stats.extra["draft_passes"] == 1


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_llamagen_student_comes_in_beside_its_teacher(tmp_path: Path, fixture: Fixture, parts: list[Path],
                                                        weights: Any) -> None:
    state = fixture.state_dict()
    other = {key: tensor + 1 for key, tensor in state.items()}
    content = {"model": state, "ema": other} if weights == "model" else {"model": other, "ema": state}
    torch.save({**content, "steps": 7}, tmp_path / "student.pt")
    teacher = {**torch.load(parts[1]), "ema": torch.load(parts[1])["model"]}
    torch.save(teacher, tmp_path / "teacher.pt")
    out = convert("dd1", [tmp_path / "student.pt", parts[0], tmp_path / "teacher.pt"], tmp_path / "out", heads=4,
                  image_size=8, weights=weights)
    pipe = Pipeline.from_pretrained(out, device="cpu")
    student, noise = pipe.decoders["dd1"], fixture["in.noise"]
    with torch.no_grad():
        logits, latents = student(noise, torch.zeros(len(noise)), Condition(class_ids_B=fixture["in.label"]), (4, 4))
    fixture.compare("out.t0.logits", logits)
    fixture.compare("out.t0.tokens", latents)
    assert pipe(class_id=1).codes.shape == (1, 16) and "distilled_decoding" in pipe.settings.source
    assert_the_student_paints(pipe, (0, 1), top_k=9)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_var_student_comes_in_beside_its_teacher(tmp_path: Path, weights: Any) -> None:
    fixture, vae = load(PARITY / "dd1_var_student.safetensors"), load(PARITY / "var_vqvae.safetensors")
    teacher = load(PARITY / "dd1_var_teacher_involved.safetensors").state_dict("var.")
    state = fixture.state_dict("dd.")
    other = {key: tensor + 1 for key, tensor in state.items()}
    names = ("var_wo_ddp", "ema_parameters") if weights == "model" else ("ema_parameters", "var_wo_ddp")
    files = {"student.pth": {"trainer": dict(zip(names, (state, other))), "epoch": 3}, "vae.pth": vae.state_dict(),
             "teacher.pth": {"trainer": {"var_wo_ddp": teacher, "ema_parameters": teacher}}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    out = convert("dd1", [tmp_path / name for name in files], tmp_path / "out", weights=weights)
    pipe = Pipeline.from_pretrained(out, device="cpu")
    student, noise, grid = pipe.decoders["dd1"], fixture["in.noise"], (4, 4)
    with torch.no_grad():
        logits, latents = student(noise, torch.zeros(len(noise)), Condition(class_ids_B=fixture["in.label"]), grid)
    fixture.compare("out.t0.logits", logits)
    fixture.compare("out.t0.tokens", latents)
    assert pipe.settings.top_k == 900
    assert_the_student_paints(pipe, (0, 2), top_k=9)
    decoder = Dd1(student, Schedule((0, 2), 2, teacher=(1, 2)))
    painted = pipe(class_id=1, top_k=9, decoder=decoder, lossy=True, seed=3)
    assert painted.images[0].size == (8, 8) and painted.codes.shape == (1, 30)


@pytest.mark.parametrize("weights,name", [("model", "var_wo_ddp"), ("ema", "ema_parameters")])
def test_the_wrappers_of_var_students(tmp_path: Path, weights: Any, name: str) -> None:
    trainer = {"var_wo_ddp": {"pos_start": torch.zeros(1)}, "ema_parameters": {"pos_start": torch.ones(1)},
               "optimizer": {"state": 0}}
    torch.save({"trainer": trainer, "epoch": 3}, tmp_path / "var.pth")
    found = read_original(tmp_path / "var.pth", weights)
    assert found.weights == weights and torch.equal(found.state["pos_start"], trainer[name]["pos_start"])


def test_refusals(tmp_path: Path, fixture: Fixture, parts: list[Path]) -> None:
    path = tmp_path / "student.pt"
    cases: list[tuple[str, dict[str, Tensor], list[Path], str]] = [
        ("dd1", {}, parts, "converted together"),
        ("llamagen", {}, [path, *parts], "converted together"),
        ("dd1", {"output.weight": torch.zeros(25, 32)}, [path, *parts], "the student knows 25 codes of 4 channels"),
        ("dd1", {"n_d_embed.more": torch.zeros(1)}, [path, *parts], "n_d_embed.more"),
    ]
    for source, changes, files, message in cases:
        torch.save({"model": {**fixture.state_dict(), **changes}}, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(source, files, tmp_path / "out", heads=4, image_size=8)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
