"""Line art: the difference of Gaussians, and the learned generator with weights made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from arimg.control import base
from arimg.control.lineart_network import LineGenerator
from arimg.errors import CheckpointError, InputError, UnknownNameError


@pytest.fixture(autouse=True)
def annotators(monkeypatch, tmp_path):
    """An empty folder of weights, whatever this machine has installed."""
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "annotators"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def drawing() -> Image.Image:
    image = Image.new("RGB", (61, 47), "white")
    image.paste("navy", (10, 20, 50, 23))
    return image


@pytest.fixture
def generator() -> LineGenerator:
    torch.manual_seed(0)
    return LineGenerator().eval()


def test_strokes_are_white_on_black(drawing):
    strokes = np.array(base.build("lineart")(drawing))
    assert strokes.shape == (47, 61, 3) and (strokes == strokes[..., :1]).all()
    assert strokes[21, 30, 0] > 100
    assert not strokes[:10].any() and not strokes[35:].any()


def test_an_edge_gets_its_stroke_on_the_dark_side():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (20, 0, 40, 20))
    strokes = np.array(base.build("lineart")(image))[10, :, 0]
    assert strokes[:20].max() == 0 and strokes[20:24].max() > 100 and strokes[34:].max() == 0


def test_strokes_of_one_channel_count():
    image = Image.new("RGB", (40, 20), (255, 255, 0))
    image.paste((255, 0, 255), (18, 0, 22, 20))
    assert np.array(base.build("lineart")(image)).max() > 100


def test_blank_and_nearly_blank_pictures_stay_dark():
    assert not np.array(base.build("lineart")(Image.new("RGB", (16, 16), "gray"))).any()
    noise = np.random.default_rng(0).integers(126, 130, (32, 32, 3), dtype=np.uint8)
    assert np.array(base.build("lineart")(Image.fromarray(noise))).max() < 128


def test_broader_sigma_gives_broader_strokes():
    image = Image.new("RGB", (80, 80), "white")
    image.paste("black", (40, 0, 80, 80))
    thin, broad = ((np.array(base.build("lineart", sigma=sigma)(image)) > 20).sum() for sigma in (1, 4))
    assert thin < broad


def test_strokes_are_thin_at_any_contrast():
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (10, 10, 50, 20))
    image.paste((220, 220, 220), (10, 25, 50, 35))
    column = np.array(base.build("lineart")(image))[:, 30, 0] > 60
    widths = [int(column[top:top + 6].sum()) for top in (8, 23)]
    assert all(1 <= width <= 3 for width in widths), widths


def test_without_weights_auto_is_classical_and_says_so_once(drawing, caplog):
    auto = base.build("lineart")
    assert auto(drawing).tobytes() == base.build("lineart", method="classical")(drawing).tobytes()
    notices = [record for record in caplog.records if record.name == "arimg"]
    assert len(notices) == 1 and "no weights at" in notices[0].getMessage() and "sk_model.pth" in caplog.text
    status = base.build("lineart").status()
    assert status.ready and "classical" in status.detail and "learned generator" in status.detail


def test_installed_weights_give_the_network(generator, drawing, annotators, caplog):
    torch.save(generator.state_dict(), annotators / "sk_model.pth")
    learned = base.build("lineart", weights=annotators / "sk_model.pth")(drawing).tobytes()
    assert all(base.build("lineart", method=method)(drawing).tobytes() == learned for method in ("auto", "network"))
    assert base.build("lineart", method="classical")(drawing).tobytes() != learned
    assert not caplog.records and "weights" in base.build("lineart").status().detail


def test_methods_that_cannot_be(annotators):
    with pytest.raises(UnknownNameError, match="unknown lineart method 'clasical'; did you mean classical"):
        base.build("lineart", method="clasical")
    with pytest.raises(CheckpointError, match="method=network needs weights.*sk_model.pth.*does not exist"):
        base.build("lineart", method="network")
    with pytest.raises(InputError, match="weights=x.pth with method=classical"):
        base.build("lineart", method="classical", weights="x.pth")


@pytest.mark.parametrize("options, message", [
    ({"sigma": 0}, "lineart sigma is 0"), ({"sigma": "wide"}, "lineart sigma is 'wide'"),
    ({"threshold": 255}, "lineart threshold is 255"), ({"threshold": -1}, "lineart threshold is -1"),
])
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        base.build("lineart", **options)


def test_state_dict_is_that_of_the_released_generator():
    state = LineGenerator().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if key.endswith("weight")} == {
        "model0.1.weight": (64, 3, 7, 7), "model1.0.weight": (128, 64, 3, 3), "model1.3.weight": (256, 128, 3, 3),
        **{f"model2.{i}.conv_block.{j}.weight": (256, 256, 3, 3) for i in range(3) for j in (1, 5)},
        "model3.0.weight": (256, 128, 3, 3), "model3.3.weight": (128, 64, 3, 3), "model4.1.weight": (1, 64, 7, 7)}
    assert len(state) == 24


def test_generator_hardly_sees_the_range_of_its_input(generator):
    """ControlAR feeds 0..255, the generator was trained on 0..1: instance normalisation makes them one."""
    pixels = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(generator(pixels), generator(pixels * 255), atol=2e-3, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_defect_19_learned_maps_are_inverted_to_white_on_black(generator, drawing, tmp_path, suffix):
    path = tmp_path / f"sk_model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(generator.state_dict(), path)
    strokes = np.array(base.build("lineart", weights=path)(drawing))
    pixels = torch.from_numpy(np.array(drawing)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = (1 - generator(pixels)[0, 0]) * 255
    assert strokes.shape == (47, 61, 3)
    assert np.abs(strokes[..., 0] - expected.numpy()).max() <= 1


def test_learned_needs_a_few_pixels(generator, tmp_path):
    save_file(generator.state_dict(), tmp_path / "w.safetensors")
    extractor = base.build("lineart", weights=tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="picture of 50x7 pixels is too narrow"):
        extractor(Image.new("RGB", (50, 7)))
    assert extractor(Image.new("RGB", (9, 8))).size == (9, 8)


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_weights_that_cannot_be_used(generator, tmp_path, capsys):
    state = generator.state_dict()
    files = {
        "missing.pth": None,
        "cut.safetensors": "cut", "noise.pth": b"no torch file", "noise.safetensors": b"no safetensors file",
        "evil.pth": Malicious(), "number.pth": 3,
        "lacks.pth": {key: value for key, value in state.items() if key != "model4.1.bias"},
        "extra.pth": {**state, "model9.bias": torch.zeros(1)},
        "shape.pth": {**state, "model0.1.bias": torch.zeros(65)},
        "other.pth": {f"layer{i}": torch.zeros(1) for i in range(9)},
    }
    parts = {
        "missing.pth": "do not exist", "cut.safetensors": "is damaged", "noise.pth": "more than tensors",
        "noise.safetensors": "damaged", "evil.pth": "not opened for safety", "number.pth": "not a flat table",
        "lacks.pth": "do not fit LineGenerator: 1 missing: model4.1.bias;", "extra.pth": "1 unexpected: model9.bias",
        "shape.pth": r"1 of another shape: model0.1.bias \(65,\) instead of \(64,\)",
        "other.pth": ", ...; 9 unexpected: layer0",
    }
    for name, content in files.items():
        path = tmp_path / name
        if content == "cut":
            save_file(state, path)
            path.write_bytes(path.read_bytes()[:5000])
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(CheckpointError, match=parts[name]) as caught:
            base.build("lineart", weights=path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out
