"""Everything a user can get wrong (acceptance A7): one line with the value, exit code 2, no traceback, no file left."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from arimg import images
from arimg.cli import main
from arimg.tokenizers.vq import VQTokenizer
from tests.toy import SIDE, toy_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (SIDE, SIDE)).save("map.png")


def fails(*arguments: str, code: int = 2) -> str:
    """Run, and return the line on stderr; the folder holds what it held before."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert sorted(Path().rglob("*")) == before, "a file was left behind"
    assert result.stdout == "" and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("arimg: error: ")]
    assert len(errors) == 1 and result.stderr.endswith(f"{errors[0]}\n"), result.stderr
    return errors[0].removeprefix("arimg: error: ")


def sample_fails(model: Path, *arguments: str, code: int = 2) -> str:
    return fails("sample", "--model", str(model), "-o", "out.png", *arguments, code=code)


# ---------------------------------------------------------------------------------------------------------------------
# Input pictures


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file that claims a size."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(picture: Image.Image, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))

BAD_FILES = {
    "empty": (b"", "is empty (0 bytes); give a PNG"),
    "text": (b"canny please", "is not a picture that can be read; give a PNG"),
    "truncated": (encoded(NOISE)[:3000], "is damaged or cut off"),
    "truncated jpeg": (encoded(NOISE, "jpeg")[:400], "is damaged or cut off"),
    "bomb": (png(60_000, 60_000), "has 3600000000 pixels, more than the limit of 64000000"),
    "large": (png(9_000, 9_000), "has 81000000 pixels, more than the limit of 64000000"),
}


@pytest.mark.parametrize("option", ["--control", "--control-from"])
@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_pictures_that_cannot_be_read(model: Path, option: str, name: str) -> None:
    content, message = BAD_FILES[name]
    Path("bad.png").write_bytes(content)
    line = sample_fails(model, option, "bad.png")
    assert "'bad.png'" in line and message in line


def test_a_missing_picture(model: Path) -> None:
    assert "control image 'mpa.png' does not exist; check the path" in sample_fails(model, "--control", "mpa.png")
    assert "photo 'mpa.png' does not exist" in fails("control", "canny", "mpa.png")


def test_a_folder_as_picture(model: Path) -> None:
    Path("folder").mkdir()
    assert "'folder' is a folder; give the path of one picture file" in sample_fails(model, "--control", "folder")


def test_an_unreadable_picture(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(path: Path, *given: Any, **options: Any) -> Any:
        if path.name == "map.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *given, **options)
    monkeypatch.setattr(Path, "open", refuse)
    assert "'map.png' cannot be read: Permission denied" in sample_fails(model, "--control", "map.png")


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.full((SIDE, SIDE), 65535, np.uint16))


def with_alpha() -> Image.Image:
    return Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))


def turned() -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    picture.getexif()[0x0112] = 6
    return picture


@pytest.mark.parametrize(("make", "suffix"), [
    (sixteen_bit, "png"), (with_alpha, "png"), (turned, "jpg"),
    (lambda: Image.new("P", (SIDE, SIDE), 0), "png"), (lambda: Image.new("L", (SIDE, SIDE), 255), "png"),
    (lambda: Image.new("1", (SIDE, SIDE), 1), "png"), (lambda: Image.new("CMYK", (SIDE, SIDE)), "jpg"),
    (lambda: Image.new("LA", (SIDE, SIDE)), "png"),
], ids=["16-bit", "alpha", "exif", "palette", "grey", "1-bit", "cmyk", "grey-alpha"])
def test_unusual_pictures_are_handled(model: Path, make: Callable[[], Image.Image], suffix: str) -> None:
    make().save(f"unusual.{suffix}")
    arguments = ["sample", "--model", str(model), "--control", f"unusual.{suffix}", "-o", "x.png"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Names and values


@pytest.mark.parametrize(("arguments", "message"), [
    (["--size", "18x16"], "size 18x16: both sides must be multiples of 4; the nearest is 16x16"),
    (["--size", "16"], "'16' is no size; write height x width in pixels, for example 128x128"),
    (["--size", "0x16"], "the nearest is 4x16"),
    (["--control-type", "cany", "--control", "map.png"], "unknown control type 'cany'; did you mean canny?"),
    (["--control-type", "depth", "--control", "map.png"], "control type 'depth': this model was trained on canny"),
    (["--control-type", "canny"], "control_type canny is given without a control image"),
    (["--control-scale", "0.5"], "control_scale 0.5 is given without a control image"),
    (["--control-end", "0.5"], "control_end 0.5 is given without a control image"),
    (["--control", "map.png", "--control-scale", "1", "--control-scale", "2"], "2 values of control_scale for 1"),
    (["--control", "map.png", "--control-scale", "nan"], "--control-scale nan: needs a finite number"),
    (["--control", "map.png", "--control-start", "0.8", "--control-end", "0.2"], "needs 0 <= start < end <= 1"),
    (["--control", "map.png", "--resize", "zoom"], "unknown resize mode 'zoom'"),
    (["--control", "map.png", "--guidance-order", "map-first"], "unknown guidance order 'map-first'"),
    (["--plausibility", "2"], "--plausibility 2.0: needs a number in [0, 1]"),
    (["--plausibility", "nan"], "--plausibility nan: needs a number in [0, 1]"),
    (["--class", "doog"], "unknown class 'doog'; did you mean dog?"),
    (["--class", "17"], "class 17: the ids of this model are 0 to 2"),
    (["--class", "²"], "unknown class '²'"),
    (["--class", "--1"], "unknown class '--1'"),
    (["--class", "9" * 5000], "unknown class '999"),
    (["--device", "meta"], "device 'meta' cannot be used here"),
    (["--prompt", "a cat"], "a prompt is given, but this model knows classes"),
    (["--decoder", "jacoby"], "unknown decoder 'jacoby'"),
    (["--temperature", "-1"], "--temperature -1.0: needs a finite number >= 0"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--top-p", "2"], "--top-p 2.0: needs a number in (0, 1]"),
    (["--top-k", "-1"], "--top-k -1: needs a whole number >= 0"),
    (["--cfg", "nan"], "--cfg nan: a guidance scale is a finite number"),
    (["--cfg", "inf"], "--cfg inf"),
    (["--control-cfg", "-2"], "--control-cfg -2.0"),
    (["--cfg-interval", "9:3"], "--cfg-interval 9:3: needs 0 <= first < stop"),
    (["--cfg-interval", f"0:{'9' * 30}"], "is no interval; write token positions as first:stop"),
    (["--cfg-interval", "early"], "'early' is no interval; write token positions as first:stop"),
    (["-n", "0"], "n is 0; ask for 1 to 1024 pictures"),
    (["-n", "1000000000"], "n is 1000000000; ask for 1 to 1024 pictures"),
    (["-n", "many"], "'many' is not a valid integer"),
    (["--seed", "-5"], "seed -5: a seed is a whole number from 0"),
    (["--seed", "x"], "'x' is not a valid integer"),
    (["--seed", str(2 ** 63)], f"seed {2 ** 63}: a seed is a whole number"),
    (["--device", "gpu"], "device 'gpu' cannot be used here"),
    (["--dtype", "float23"], "unknown dtype 'float23'; did you mean float"),
    (["--format", "gif"], "unknown picture format 'gif'"),
    (["--contol", "map.png"], "No such option"),
    (["map.png"], "Got unexpected extra argument (map.png); see: arimg sample --help"),
    (["--window", "0"], "no window"),
    (["--window", "wide"], "no window"),
    (["--decoder", "ar", "--window", "4"], "has no window"),
    (["--decoder", "zipar"], "add --lossy"),
    (["--decoder", "gsd"], "add --lossy"),
    (["--decoder", "zipar", "--lossy", "--window", "auto"], "whole number of codes"),
    (["--decoder", "jacoby"], "did you mean jacobi"),
    (["--trace", "out.png"], "a picture goes there"),
    (["--trace", "trace.txt"], "txt"),
])
def test_values(model: Path, arguments: list[str], message: str) -> None:
    assert message in sample_fails(model, *arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (["smaple"], "unknown command 'smaple'; did you mean sample?"),
    ([], "Missing command; see: arimg --help"),
    (["data"], "Missing command; see: arimg data --help"),
    (["control", "canny"], "give a TYPE and a PHOTO, or --list; see: arimg control --help"),
    (["control", "cany", "map.png"], "unknown control type 'cany'; did you mean canny?"),
    (["control", "canny", "map.png", "-O", "low"], "-O low: write it as key=value"),
    (["control", "canny", "map.png", "-O", "lo=3"], "unknown option of canny 'lo'; did you mean low?"),
    (["control", "canny", "map.png", "-O", "low=x"], "canny low is 'x'; it must be a number"),
    (["control", "canny", "map.png", "-o", "no/where.png"], "output folder 'no' does not exist; type: mkdir -p no"),
    (["convert", "--from", "lamagen", "x.pt", "-o", "d"], "unknown kind of original weights 'lamagen'; did you mean"),
    (["convert", "--from", "llamagen", "x.pt", "-o", "d"], "x.pt: no such file"),
    (["convert", "--from", "llamagen", "x.pt", "-o", "d", "--weights", "best"], "'best' is not one of 'model', 'ema'"),
    (["convert", "--from", "llamagen", "-o", "d"], "Missing argument 'FILE...'"),
    (["convert", "--from", "llamagen", "x.pt", "-o", "d", "--class-names", "no.txt"], "no.txt: cannot be read"),
    (["data", "emoji", "--source", "nowhere", "--out", "d"], "--source nowhere: no such folder"),
    (["train", "nothing.yaml"], "nothing.yaml: cannot be read"),
])
def test_other_commands(arguments: list[str], message: str) -> None:
    assert message in fails(*arguments)


def test_models_that_cannot_be_found() -> None:
    assert "unknown model 'emojy'" in fails("sample", "--model", "emojy")
    assert "./nowhere: no such folder; give a pipeline folder" in fails("sample", "--model", "./nowhere")
    Path("empty").mkdir()
    assert "empty: has no model_index.json" in fails("sample", "--model", "empty")
    assert "map.png: is a file, not a pipeline folder" in fails("sample", "--model", "map.png")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a component."""
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda at: edit(at / "transformer", lambda state: state.pop("norm.weight")), "1 missing: norm.weight"),
    (lambda at: edit(at / "control", lambda state: state.update(extra=torch.zeros(1))), "1 unexpected: extra"),
    (lambda at: edit(at / "tokenizer", lambda state: state.update({"quant_conv.bias": torch.zeros(9)})),
     "quant_conv.bias (9,) instead of (4,)"),
    (lambda at: (at / "transformer" / "diffusion_pytorch_model.safetensors").unlink(), "has no weights"),
    (lambda at: (at / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x09"), "is damaged"),
    (lambda at: (at / "transformer" / "config.json").unlink(), "config.json: no such file; the folder is not complete"),
    (lambda at: (at / "transformer" / "config.json").write_text("{"), "cannot be read as JSON"),
    (lambda at: (at / "transformer" / "config.json").write_text('{"_class_name": "os"}'), "unknown class 'os'"),
    (lambda at: (at / "model_index.json").write_text('{"tokenizer": ["os", "system"]}'), "wants code from 'os'"),
    (lambda at: (at / "model_index.json").write_text("{}"), "model_index.json names no tokenizer"),
], ids=["missing", "extra", "misshapen", "no weights", "truncated", "no config", "bad json", "class", "foreign code",
        "empty"])
def test_checkpoint_faults(spoil: Callable[[Path], Any], message: str) -> None:
    folder = toy_folder(Path("toy"))
    spoil(folder)
    assert message in sample_fails(folder)


class Exploit:
    """Unpickling this would create a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("save", [
    lambda path: torch.save({"model": Exploit()}, path), lambda path: path.write_bytes(pickle.dumps(Exploit())),
], ids=["torch.save", "bare pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(save: Callable[[Path], Any]) -> None:
    save(Path("evil.pt"))
    line = fails("convert", "--from", "llamagen", "evil.pt", "-o", "out")
    assert "evil.pt: refused, because it is a pickle that runs code" in line
    assert not Path("exploited").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def test_from_a_picture_without_a_recipe() -> None:
    assert "picture 'map.png' carries no arimg metadata" in fails("sample", "--from", "map.png")
    images.save_image(Image.new("RGB", (4, 4)), "other.png", {"something": 1})
    assert "--from other.png: its arimg metadata holds no recipe" in fails("sample", "--from", "other.png")


@pytest.mark.parametrize(("recipe", "message"), [
    ({"options": {}, "controls": [{"source": "a", "sha256": "0", "png": "AAAA"}]}, "a control image in its recipe is"),
    ({"options": {}, "controls": [7]}, "a control image in its recipe is damaged; give --control FILE"),
    ({"options": {"size": "large"}, "controls": []}, "'large' is no size"),
    ({"options": {"seed": "x"}, "controls": []}, "'x' is not a valid integer"),
    ({"options": {"seed": 1.5}, "controls": []}, "'1.5' is not a valid integer"),
    ({"options": {"n": [1]}, "controls": []}, "--from bad.png: n = [1] in its recipe is damaged; use the file as"),
    ({"options": {"n": None}, "controls": []}, "n = None in its recipe is damaged"),
    ({"options": {"cfg": {}}, "controls": []}, "cfg = {} in its recipe is damaged"),
    ({"options": {"control_scale": 1}, "controls": []}, "control_scale = 1 in its recipe is damaged"),
    ({"options": {"control_scale": [[1]]}, "controls": []}, "control_scale = [[1]] in its recipe is damaged"),
])
def test_from_a_damaged_recipe(model: Path, recipe: dict[str, Any], message: str) -> None:
    recipe["options"]["model"] = str(model)
    images.save_image(Image.new("RGB", (4, 4)), "bad.png", recipe)
    assert message in fails("sample", "--from", "bad.png")


def test_a_recipe_nested_without_end(model: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("arimg", "[" * 100_000)
    Image.new("L", (4, 4)).save("deep.png", pnginfo=text)
    assert "the arimg metadata of picture 'deep.png' is damaged" in fails("sample", "--from", "deep.png")


def test_a_recipe_does_not_choose_what_is_read_or_written(model: Path) -> None:
    options = {"model": str(model), "output": "theirs.png", "json_path": "theirs.json", "format_name": "webp",
               "control": ["/etc/passwd"], "control_from": ["/etc/passwd"], "device": "nowhere"}
    images.save_image(Image.new("RGB", (4, 4)), "theirs-recipe.png", {"options": options, "controls": []})
    result = CliRunner().invoke(main, ["sample", "--from", "theirs-recipe.png", "-o", "mine.png"])
    assert result.exit_code == 0, result.stderr
    assert sorted(map(str, Path().iterdir())) == ["map.png", "mine.png", "theirs-recipe.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Output


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model ran before the output was checked")


@pytest.mark.parametrize(("arguments", "message"), [
    (["-o", "no/out.png"], "output folder 'no' does not exist; type: mkdir -p no"),
    (["-o", "folder"], "output 'folder' has the suffix '', which names no known picture format"),
    (["-o", "folder.png"], "output 'folder.png' is a folder"),
    (["-o", "out.xyz"], "the suffix '.xyz', which names no known picture format"),
    (["-o", "out.png", "-n", "2"], "output 'out-1.png' is a folder"),
    (["-o", "x.png", "--json", "folder"], "output 'folder' is a folder; add a file name"),
    (["-o", "x.png", "--json", "no/x.json"], "output folder 'no' does not exist"),
    (["-o", "x.png", "--json", "map.png/x.json"], "output folder 'map.png' is not a folder"),
    (["-o", "x.png", "--json", "/dev/full"], "output '/dev/full' is not a regular file"),
    (["-o", "x.png", "--json", "./x.png"], "--json ./x.png: a picture goes there; name another file, for example x.js"),
    (["-o", "x.png", "-n", "2", "--json", "x-1.png"], "--json x-1.png: a picture goes there"),
])
def test_output_is_checked_before_the_model_runs(model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                                 message: str) -> None:
    for name in ("folder", "folder.png", "out-1.png"):
        Path(name).mkdir()
    monkeypatch.setattr("arimg.pipeline.Pipeline.from_pretrained", never)
    assert message in fails("sample", "--model", str(model), *arguments)


def test_a_folder_that_may_not_be_written_to(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("arimg.pipeline.Pipeline.from_pretrained", never)
    assert "output folder '.' may not be written to" in sample_fails(model)


@pytest.mark.parametrize("function", ["os.replace", "pathlib.Path.open"])
def test_a_full_disk(model: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    module, _, name = function.rpartition(".")
    real = Path.open if name == "open" else os.replace

    def full(*given: Any, **options: Any) -> Any:
        if name == "replace" or "x" in "".join(given[1:]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **options)
    monkeypatch.setattr(function, full)
    assert "output 'out.png' cannot be written: No space left on device; free space" in sample_fails(model)
    assert "No space left on device" in fails("control", "canny", "map.png", "-o", "m.png")


def test_ctrl_c_while_painting(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt
    monkeypatch.setattr(VQTokenizer, "decode_codes", interrupt)
    Path("out.png").write_bytes(b"older")
    assert "interrupted" in sample_fails(model, code=130)
    assert Path("out.png").read_bytes() == b"older"


def test_ctrl_c_while_writing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", interrupt)
    assert "interrupted" in sample_fails(model, code=130)


@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
     " (tried to allocate 20.00 GiB)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes. Error code 12"),
     " (tried to allocate 80 bytes)"),
    (MemoryError(), ""),
], ids=["cuda", "cpu", "python"])
def test_out_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def exhaust(*_: Any) -> Any:
        raise error
    monkeypatch.setattr(VQTokenizer, "decode_codes", exhaust)
    assert sample_fails(model) == f"out of memory{message}; use a smaller -n, --size, batch or model"


def test_a_fault_of_the_program_is_not_hidden(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> Any:
        raise RuntimeError("shapes differ")
    monkeypatch.setattr(VQTokenizer, "decode_codes", fault)
    result = CliRunner().invoke(main, ["sample", "--model", str(model), "-o", "out.png"])
    assert isinstance(result.exception, RuntimeError) and "shapes differ" in str(result.exception)


def test_an_error_of_the_system_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")
    monkeypatch.setattr("arimg.train.emoji.build_emoji", refuse)
    assert fails("data", "emoji") == (
        "/somewhere: Permission denied; check the path, its permissions and the free space")


# ---------------------------------------------------------------------------------------------------------------------
# The same through the real program


def test_as_a_program(model: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "arimg", *arguments], capture_output=True, text=True, timeout=300,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        return done.returncode, done.stderr
    assert run("sample", "--control", "x.png", "--model", str(model)) == (
        2, f"arimg: error: control image 'x.png' does not exist; check the path (now in {str(Path.cwd())!r})\n")
    code, line = run("sample", "--foo")
    assert code == 2 and line.startswith("arimg: error: No such option") and line.endswith("see: arimg sample --help\n")


def test_without_stderr(model: Path) -> None:
    command = 'exec "$0" -m arimg sample --model "$1" -o out.png 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(model)], stdout=subprocess.PIPE, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "out.png\n")
