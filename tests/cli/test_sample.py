"""`arimg sample` on a toy model: files, recipes, statistics, progress."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

from arimg import images
from arimg.cli import main
from tests.toy import SIDE, toy_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy_folder(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, box in (("a.png", (0, 0, 15, 15)), ("b.png", (15, 0, 0, 15))):
        picture = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(picture).line(box, fill=255, width=2)
        picture.save(tmp_path / name)
    return tmp_path


def arimg(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def pixels(path: str) -> bytes:
    return images.load_image(path).tobytes()


def facts(path: str) -> tuple[str | None, tuple[int, int]]:
    """(format, (width, height))."""
    with Image.open(path) as picture:
        return picture.format, picture.size


def options_of(path: str) -> dict[str, object]:
    found: dict[str, object] = images.read_metadata(path)["options"]
    return found


def test_one_picture(model: str) -> None:
    result = arimg("sample", "--model", model, "--control", "a.png", "--class", "dog", "-o", "x.png")
    assert result.stdout == "x.png\n"
    assert "16/16" in result.stderr and "token" in result.stderr
    assert facts("x.png") == ("PNG", (SIDE, SIDE))


def test_a_grid_and_its_pictures(model: str) -> None:
    result = arimg("sample", "--model", model, "--control", "a.png", "-n", "3", "--seed", "4", "-o", "x.png")
    assert result.stdout.split() == ["x.png", "x-0.png", "x-1.png", "x-2.png"]
    grid = images.make_grid([images.load_image(f"x-{k}.png") for k in range(3)])
    assert grid.tobytes() == pixels("x.png")
    assert [options_of(f"x-{k}.png")["seed"] for k in range(3)] == [4, 5, 6]
    arimg("sample", "--model", model, "--control", "a.png", "--seed", "5", "-o", "y.png")
    assert pixels("y.png") == pixels("x-1.png")


@pytest.mark.parametrize(("suffix", "kind"), [("webp", "WEBP"), ("jpg", "JPEG")])
def test_formats_carry_the_recipe(model: str, suffix: str, kind: str) -> None:
    arimg("sample", "--model", model, "--control", "a.png", "-o", f"x.{suffix}")
    assert facts(f"x.{suffix}")[0] == kind
    assert options_of(f"x.{suffix}")["model"] == model
    arimg("sample", "--model", model, "--control", "a.png", "-o", "picture", "--format", kind.lower())
    assert facts("picture")[0] == kind


def test_statistics(model: str) -> None:
    arimg("sample", "--model", model, "-n", "2", "-o", "x.png", "--json", "x.json", "--cfg", "3")
    found = json.loads(Path("x.json").read_text(encoding="utf-8"))
    assert found["seeds"] == [0, 1] and found["codes_shape"] == [2, 16] and found["forward_passes"] == 16
    assert set(found["seconds"]) == {"control", "tokens", "pixels"} and found["images"][0] == "x.png"
    assert found["options"]["cfg"] == 3.0 and found["options"]["size"] == "16x16"


def test_several_controls_pair_up_in_order(model: str) -> None:
    two = ("sample", "--model", model, "--control", "a.png", "--control", "b.png")
    arimg(*two, "--control-scale", "1", "--control-scale", "0", "-o", "x.png")
    arimg("sample", "--model", model, "--control", "a.png", "-o", "y.png")
    assert pixels("x.png") == pixels("y.png")
    arimg(*two, "--control-type", "canny", "--control-start", "0", "--control-start", "0.5", "--control-end", "0.5",
          "--control-end", "1", "-o", "z.png")
    entries = images.read_metadata("z.png")["controls"]
    assert [entry["source"] for entry in entries] == ["a.png", "b.png"]


class TestFrom:
    """--from repeats a picture from the picture alone."""

    def test_repeats(self, model: str) -> None:
        arimg("sample", "--model", model, "--control", "a.png", "--class", "dog", "--cfg", "2.5",
              "--cfg-interval", "2:9", "--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "8",
              "-n", "2", "-o", "x.png")
        Path("a.png").unlink()
        arimg("sample", "--from", "x.png", "-o", "again.png")
        assert [Path(f"again{k}.png").read_bytes() for k in ("", "-0", "-1")] == [
            Path(f"x{k}.png").read_bytes() for k in ("", "-0", "-1")]
        arimg("sample", "--from", "x-1.png", "-o", "one.png")
        assert Path("one.png").read_bytes() == Path("x-1.png").read_bytes()

    def test_a_photo_is_kept_as_its_map(self, model: str) -> None:
        Image.linear_gradient("L").point(lambda value: 255 * (value > 128)).save("photo.png")
        arimg("sample", "--model", model, "--control-from", "photo.png", "-o", "x.png")
        Path("photo.png").unlink()
        arimg("sample", "--from", "x.png", "-o", "again.png")
        assert Path("again.png").read_bytes() == Path("x.png").read_bytes()

    def test_options_beside_it_win(self, model: str) -> None:
        arimg("sample", "--model", model, "--control", "a.png", "--class", "dog", "--seed", "3", "-o", "x.png")
        arimg("sample", "--from", "x.png", "--seed", "4", "--control-scale", "0.5", "-o", "y.png")
        assert options_of("y.png") == {**options_of("x.png"), "seed": 4, "control_scale": [0.5]}
        arimg("sample", "--from", "x.png", "--control", "b.png", "-o", "z.png")
        assert images.read_metadata("z.png")["controls"][0]["source"] == "b.png"
        arimg("sample", "--model", model, "--control", "b.png", "--class", "dog", "--seed", "3", "-o", "w.png")
        assert pixels("z.png") == pixels("w.png")

    def test_the_models_defaults_are_written_out(self, model: str) -> None:
        arimg("sample", "--model", model, "-o", "x.png")
        assert options_of("x.png") == {
            "cfg": 2.0, "cfg_interval": "0:", "decoder": "ar", "dtype": options_of("x.png")["dtype"],
            "guidance_order": "class-first", "model": model, "n": 1, "plausibility": 0.0, "resize": "pad", "seed": 0,
            "size": "16x16", "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def test_size(model: str) -> None:
    result = arimg("sample", "--model", model, "--control", "a.png", "--size", "8x20", "-o", "x.png")
    assert facts("x.png")[1] == (20, 8)
    assert "arimg: size 8x20: the model was trained at 16x16" in result.stderr
    assert "arimg: control image 16x16 fitted to 8x20 (resize pad)" in result.stderr


def test_dtype_and_device(model: str) -> None:
    arimg("sample", "--model", model, "--device", "cpu", "--dtype", "fp64", "-o", "x.png")
    assert options_of("x.png")["dtype"] == str(torch.float64).removeprefix("torch.")


def test_the_embedded_model_on_the_example() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "canny.png"
    result = arimg("sample", "--control", str(example), "-o", "x.png")
    assert "fitted" not in result.stderr
    assert facts("x.png") == facts(str(example))


def test_decoders_windows_and_their_figures(model: str) -> None:
    base = ["sample", "--model", model, "--control", "a.png", "-n", "2"]
    arimg(*base, "-o", "ar.png", "--decoder", "ar", "--json", "ar.json")
    for window in ("1", "4", "auto"):
        arimg(*base, "-o", "jacobi.png", "--decoder", "jacobi", "--window", window, "--json", "jacobi.json")
        assert pixels("jacobi-1.png") == pixels("ar-1.png")
        assert options_of("jacobi.png")["window"] in (window, int(window) if window != "auto" else None)
    plain, fast = (json.loads(Path(name).read_text()) for name in ("ar.json", "jacobi.json"))
    assert plain["forward_passes"] == 16 and fast["forward_passes"] < 16
    assert plain["guarantee"] == fast["guarantee"] == "same-codes"
    assert len(fast["accepted_per_pass"]) == fast["forward_passes"] and plain["audit"] is None


def test_a_lossy_decoder_says_so(model: str) -> None:
    arimg("sample", "--model", model, "--decoder", "zipar", "--lossy", "--window", "2", "--json", "x.json",
          "-o", "x.png")
    assert json.loads(Path("x.json").read_text())["guarantee"] == "none"
    arimg("sample", "--from", "x.png", "-o", "y.png")
    assert pixels("x.png") == pixels("y.png")


def test_audit(model: str) -> None:
    result = arimg("sample", "--model", model, "-n", "4", "--audit", "--json", "x.json", "-o", "x.png")
    assert result.stdout.split() == ["x.png", "x-0.png", "x-1.png", "x-2.png", "x-3.png"]
    assert "audit of 64 tokens" in result.stderr and "consistent with plain decoding" in result.stderr
    report = json.loads(Path("x.json").read_text())["audit"]
    assert report["lawful"] and report["tokens"] == 64


def test_trace(model: str) -> None:
    result = arimg("sample", "--model", model, "-n", "2", "--trace", "trace.png", "-o", "x.png")
    assert result.stdout.split()[-1] == "trace.png"
    kind, (width, height) = facts("trace.png")
    assert kind == "PNG" and width > 2 * 500 and height > 500
    assert len(set(images.load_image("trace.png").crop((0, 0, 512, 512)).get_flattened_data())) > 4
