"""`arimg bench` and `arimg data codes` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import arimg as arimg_package
from arimg.checkpoints import save_component
from arimg.cli import main
from arimg.data import to_images
from arimg.tokenizers.base import Encoded
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from tests.toy import SIDE, toy_folder, toy_pipeline
from tests.toy_decoders import with_students
from tests.train.toy_emoji import write_toy_emoji

EMBEDDED = str(Path(arimg_package.__file__).parent / "assets" / "emoji" / "transformer")
RECIPE = """\
objective: tokenizer
name: toy
data: {batch_size: 2, crop: {kind: window, size: 8}}
model: {codebook_size: 16, codebook_dim: 4, base_channels: 32, multipliers: [1, 1], res_blocks: 1, z_channels: 8}
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path / "home"))
    Path("run.yaml").write_text(RECIPE, encoding="utf-8")


def arimg(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def fails(*arguments: str) -> str:
    """The one line on stderr."""
    result = arimg(*arguments, code=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("arimg: error: ")
    return result.stderr


@pytest.mark.parametrize("command", [("bench", "train"), ("bench", "decode"), ("data", "codes")])
def test_help_has_an_example(command: tuple[str, str]) -> None:
    assert f"Example: arimg {' '.join(command)} " in arimg(*command, "--help").stdout


def test_bench_train() -> None:
    write_toy_emoji(Path("emoji"))
    result = arimg("bench", "train", "run.yaml", "data.folder=emoji", "--steps", "1", "--json", "figures.json")
    assert result.stdout.startswith("# toy: a training step of objective tokenizer")
    figures = json.loads(Path("figures.json").read_text(encoding="utf-8"))
    assert figures["steps"] == 1 and figures["networks"][0]["seconds"]["forward"] > 0


@pytest.mark.parametrize(("arguments", "message"), [
    (("missing.yaml",), "missing.yaml: cannot be read"),
    (("run.yaml", "--steps", "0"), "0 is not in the range"),
    (("run.yaml", "--precision", "int3"), "'int3' is not one of"),
    (("run.yaml", "--json", "nowhere/x.json"), "output folder 'nowhere' does not exist"),
    (("run.yaml", "optim.step=3"), "did you mean optim.steps"),
    (("run.yaml", "data.folder=nowhere"), "nowhere"),
])
def test_bench_train_faults(arguments: tuple[str, ...], message: str) -> None:
    assert message in fails("bench", "train", *arguments)


@pytest.fixture
def tokenizer() -> VQTokenizer:
    config = VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1), res_blocks=1,
                      z_channels=8)
    network = VQTokenizer(config).eval()
    save_component(network, Path("tokenizer"), torch.float32)
    return network


def test_data_codes_encodes_pictures_and_mirror_images_once(tokenizer: VQTokenizer,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_toy_emoji(Path("emoji"))
    result = arimg("data", "codes", "--tokenizer", "tokenizer", "--data", "emoji")
    images = to_images(np.load(folder / "images.npy"))
    expected = torch.cat([tokenizer.encode(images).codes_BL, tokenizer.encode(images.flip(-1)).codes_BL])
    codes = np.load(result.stdout.rstrip("\n"))
    assert np.array_equal(codes, expected.numpy()) and "24/24" in result.stderr
    monkeypatch.setattr(VQTokenizer, "encode", "not called for what is there")
    assert arimg("data", "codes", "--tokenizer", "tokenizer", "--data", "emoji").stdout == result.stdout


def test_data_codes_goes_on_after_an_interruption(tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_emoji(Path("emoji"))
    encode, sizes = VQTokenizer.encode, []

    def interrupted(self: VQTokenizer, images: torch.Tensor) -> Encoded:
        sizes.append(len(images))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return encode(self, images)
    monkeypatch.setattr("arimg.commands.data._PICTURES_AT_ONCE", 10)
    monkeypatch.setattr(VQTokenizer, "encode", interrupted)
    arimg("data", "codes", "--tokenizer", "tokenizer", "--data", "emoji", code=130)
    arimg("data", "codes", "--tokenizer", "tokenizer", "--data", "emoji")
    assert sizes == [10, 10, 10, 4]


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "Missing option '--tokenizer'"),
    (("--tokenizer", "tokenizer", "--data", "nowhere"), "nowhere"),
    (("--tokenizer", "nowhere"), "nowhere"),
    (("--tokenizer", EMBEDDED), "ARTransformer, which encodes no pictures"),
])
def test_data_codes_faults(tokenizer: VQTokenizer, arguments: tuple[str, ...], message: str) -> None:
    write_toy_emoji(Path("home/data/emoji-128"))
    assert message in fails("data", "codes", *arguments)


def test_bench_decode() -> None:
    toy_folder(Path("toy"))
    Image.new("L", (SIDE, SIDE)).save("map.png")
    result = arimg("bench", "decode", "--model", "toy", "--decoder", "ar", "--decoder", "jacobi", "--window", "4",
                   "--control", "map.png", "--cfg", "1", "-n", "1", "--repeats", "1", "--json", "figures.json")
    assert result.stdout.startswith("# toy: decoders side by side") and result.stdout.count("| `jacobi W=4` |") == 1
    figures = json.loads(Path("figures.json").read_text(encoding="utf-8"))
    plain, jacobi = figures["decoders"]
    assert plain["passes"] == 16 >= jacobi["passes"] and jacobi["same_as_plain"] == 1
    assert figures["pass_seconds"]["1.0"]["1"] > 0


def test_bench_decode_of_a_student() -> None:
    with_students(toy_pipeline()).save_pretrained("toy")
    Image.new("L", (SIDE, SIDE)).save("map.png")
    arimg("bench", "decode", "--model", "toy", "--decoder", "ar", "--decoder", "dd1", "--control", "map.png", "-n", "1",
          "--repeats", "1", "--json", "figures.json")
    rows = {row["decoder"]: row for row in json.loads(Path("figures.json").read_text(encoding="utf-8"))["decoders"]}
    assert list(rows) == ["ar", "dd1", "dd1 verified"]
    assert rows["dd1"]["passes"] == 1 and rows["dd1"]["tokens_per_pass"] == 16
    assert rows["dd1 verified"]["guarantee"] == "tolerance" and rows["dd1 verified"]["audit_lawful"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--decoder", "dd1"), "this model has no decoders/dd1"),
    (("--decoder", "arr"), "unknown decoder 'arr'; did you mean ar"),
    (("--model", "toyy"), "toyy"),
    (("--control", "nowhere.png"), "nowhere.png"),
    (("--cfg", "-1"), "--cfg -1.0"),
    (("--decoder", "jacobi", "--window", "wide"), "--window wide"),
    (("--decoder", "jacobi", "--window", "0"), "--window 0"),
    (("-n", "0"), "0 is not in the range"),
    (("--json", "."), "is a folder"),
    ((), "no control images"),
])
def test_bench_decode_faults(arguments: tuple[str, ...], message: str) -> None:
    toy_folder(Path("toy"))
    options = arguments if "--model" in arguments else ("--model", "toy", *arguments)
    if "--cfg" in arguments:
        Image.new("L", (SIDE, SIDE)).save("map.png")
        options += ("--control", "map.png")
    assert message in fails("bench", "decode", *options)
