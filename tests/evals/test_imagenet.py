"""Samples for evaluation: the same on 1 and 2 processes and after a kill; the protocol; the npz; memory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from click.testing import CliRunner, Result

import arimg
from arimg.bench.memory import peak_memory
from arimg.cli import main
from arimg.data import to_pixels
from arimg.errors import InputError
from arimg.evals.adm_npz import open_npz
from arimg.evals.imagenet import Plan, Sampler, departures, evaluate_samples, measured_size, sample_shards
from arimg.evals.picture_sets import PictureSet
from arimg.evals.processes import Processes
from arimg.evals.references import generation_reference, reconstruction_reference, write_reference
from arimg.evals.shards import Shards
from arimg.evals.tokenizer import resized
from arimg.interop.convert import convert
from arimg.registry import EXTRACTORS
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from tests.evals.fake import FakeInception
from tests.toy import SIDE, toy_pipeline

ROOT = Path(arimg.__file__).parents[1]
PROGRAM = ROOT / "tests/evals/with_toy_extractor.py"
NUMBER, SHARD = 22, 4


@pytest.fixture(autouse=True)
def toy_extractor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(EXTRACTORS.entries, "toy", "tests.evals.fake:FakeInception")
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy_pipeline(control=None).save_pretrained(tmp_path_factory.mktemp("model") / "toy"))


def virtual_file(path: Path, size: int = SIDE) -> Path:
    """A synthetic file in the layout of VIRTUAL_imagenet256_labeled.npz."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, size, size, 3), dtype=np.uint8)
    write_reference(path, PictureSet(FakeInception()(pixels), "toy", (size, size), "synthetic"), pixels[:30])
    return path


def imagenet(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["eval", "imagenet", "--extractor", "toy", "--device", "cpu", *arguments])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def options(model: str, number: int = NUMBER, shard: int = SHARD) -> list[str]:
    return ["--model", model, "-n", str(number), "--shard", str(shard), "--batch", "3", "--seed", "5",
            "--reference", "virtual.npz", "--rounds", "3", "--json", "report.json"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("imagenet-*.yaml")), ids=lambda path: path.stem)
def test_published_settings_measure_a_toy(path: Path, model: str) -> None:
    """Every file, with a small model, few pictures and the toy's sizes and reference."""
    virtual_file(Path("virtual.npz"))
    imagenet("--config", str(path), "--size", str(SIDE), *options(model, 6, 6))
    protocol = read_report()["protocol"]
    assert protocol["evaluation"] == "imagenet" and protocol["not_comparable_with_published"]
    published = yaml.safe_load(path.read_text())
    assert protocol["options"]["cfg"] == published["cfg"] and protocol["options"]["decoder"] == published["decoder"]


def program(*arguments: str, processes: int = 1, die_after: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DIE_AFTER_SHARDS": str(die_after)}
    command = [*launcher * (processes > 1), str(PROGRAM), "eval", "imagenet", "--extractor", "toy", "--device", "cpu"]
    return subprocess.run([sys.executable, *command, *arguments], env=environment, capture_output=True, text=True,
                          timeout=500)


def read_report(path: str = "report.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def test_classes_are_a_function_of_the_sample(model: str) -> None:
    uniform, balanced = (Plan(90, 3, how, (16, 16)).class_ids(9) for how in ("uniform", "balanced"))
    assert set(np.bincount(balanced, minlength=9)) == {10} and len(set(np.bincount(uniform, minlength=9))) > 1
    assert (np.diff(balanced) < 0).any(), "in a shuffled order"
    assert np.array_equal(uniform, Plan(90, 3, "uniform", (16, 16)).class_ids(9))
    assert not np.array_equal(uniform, Plan(90, 4, "uniform", (16, 16)).class_ids(9))


def test_384_pixels_become_256_without_antialiasing() -> None:
    images = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    found = resized(images, (256, 256))
    assert torch.equal(found, F.interpolate(images, size=(256, 256), mode="bicubic"))
    smooth = F.interpolate(images, size=(256, 256), mode="bicubic", antialias=True)
    assert (found - smooth).abs().max() > 0.5
    assert resized(images, (384, 384)) is images
    assert to_pixels(torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.3]).reshape(1, 1, 1, 5)).flatten().tolist() == [
        0, 0, 128, 255, 255]
    assert measured_size((384, 384)) == (256, 256) and measured_size((128, 128)) == (128, 128)


def test_what_is_far_from_the_published_protocol_is_said() -> None:
    reasons = departures(Plan(50_000, 0, "uniform", (256, 256)), FakeInception(), None)
    assert [reason.split()[0] for reason in reasons] == ["extractor", "no"]
    assert len(departures(Plan(500, 0, "uniform", (128, 128)), FakeInception(), None)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_the_report_holds_the_whole_protocol(model: str) -> None:
    virtual_file(Path("virtual.npz"))
    table = imagenet(*options(model), "--cfg", "1.5", "--classes", "balanced").stdout
    report = read_report()
    assert set(report["results"]["samples"]) == {"fd_toy", "sfd_toy", "is_toy", "precision_toy", "recall_toy",
                                                 "pictures", "forward_passes"}
    assert "| samples |" in table and " fid " not in table
    assert report["results"]["samples"]["forward_passes"]["value"] >= 16
    protocol = report["protocol"]
    assert {"versions", "model", "weights_sha256", "class_ids_sha256", "pictures_sha256", "extractor"} <= set(protocol)
    assert (protocol["number"], protocol["seed"], protocol["classes"]) == (NUMBER, 5, "balanced")
    assert protocol["options"]["cfg"] == 1.5 and protocol["options"]["decoder"] == "ar"
    digest = hashlib.sha256(Path("virtual.npz").read_bytes()).hexdigest()
    assert protocol["reference"] == {"kind": "training statistics", "sha256": digest}
    assert len(protocol["not_comparable_with_published"]) == 3


def test_figures_are_those_of_the_pictures_in_the_npz(model: str) -> None:
    """No PNG, no second path: what is streamed into the npz is what was measured."""
    virtual_file(Path("virtual.npz"))
    imagenet(*options(model), "--save-npz", "samples.npz")
    with np.load("samples.npz") as file:
        pixels = file["arr_0"]
    assert pixels.shape == (NUMBER, SIDE, SIDE, 3) and pixels.dtype == np.uint8
    whole = hashlib.sha256(b"".join(hashlib.sha256(one.tobytes()).digest() for one in pixels)).hexdigest()
    assert whole == read_report()["protocol"]["pictures_sha256"]
    assert not list(Path("home").rglob("pictures-*"))
    result = CliRunner().invoke(main, ["eval", "fid", "samples.npz", "virtual.npz", "--extractor", "toy", "--seed", "5",
                                       "--json", "fid.json"])
    assert result.exit_code == 0, result.stderr
    again, = read_report("fid.json")["results"].values()
    found = read_report()["results"]["samples"]
    shared = set(again) & set(found)
    assert shared == set(found) - {"forward_passes"}
    for name in shared:
        assert again[name]["value"] == pytest.approx(found[name]["value"], rel=1e-5), name


def test_killed_and_resumed(model: str) -> None:
    """At most the shard in the making is lost, and the samples are those of a run that nobody disturbed."""
    virtual_file(Path("virtual.npz"))
    killed = program(*options(model), "--work", "shards", die_after=2)
    assert killed.returncode == -signal.SIGKILL and not Path("report.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("shards").glob("features-*.npz")}
    assert len(kept) == 2
    imagenet(*options(model), "--work", "shards")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "finished shards are not made again"
    resumed = read_report()
    imagenet(*options(model))
    assert read_report() == resumed


def test_damaged_shards_are_made_again_or_named(model: str) -> None:
    """Cut off by a lost disk: made again. Wrong in the middle: named."""
    work = "--model", model, "-n", "6", "--shard", "3", "--work", "shards", "--json", "report.json"
    imagenet(*work)
    first, whole = read_report(), Path("shards/features-00000.npz").read_bytes()
    Path("shards/features-00000.npz").write_bytes(whole[:300])
    imagenet(*work)
    assert read_report() == first
    Path("shards/features-00000.npz").write_bytes(bytes(len(whole) // 2) + whole[len(whole) // 2:])
    assert "features-00000.npz: is damaged (" in imagenet(*work, code=2).stderr
    Path("shards/samples.json").write_text("{")
    assert "--work shards: samples.json is damaged (" in imagenet(*work, code=2).stderr


def test_two_processes_make_the_same_samples(model: str) -> None:
    virtual_file(Path("virtual.npz"))
    done = program(*options(model), "--work", "shards", processes=2)
    assert done.returncode == 0, done.stderr
    two = read_report()
    assert two["protocol"]["work"].pop("processes") == 2
    assert len(list(Path("shards").glob("features-*.npz"))) == 6
    imagenet(*options(model))
    one = read_report()
    assert one["protocol"]["work"].pop("processes") == 1
    assert one == two


def test_another_plan_in_the_same_folder_is_refused(model: str) -> None:
    imagenet("--model", model, "--num", "6", "--work", "shards")
    line = imagenet("--model", model, "--num", "6", "--work", "shards", "--seed", "1", "--cfg", "1", code=2).stderr
    assert "holds samples that were made differently (" in line
    assert "options.cfg: 2.0 / 1.0; seed: 0 / 1); give another folder" in line


def test_without_a_reference_the_score_alone(model: str) -> None:
    imagenet("--model", model, "--num", "6", "--json", "report.json")
    assert "is_toy" in read_report()["results"]["samples"] and "fd_toy" not in read_report()["results"]["samples"]


def test_every_share_is_made_once(model: str, tmp_path: Path) -> None:
    sampler = Sampler(toy_pipeline(control=None), {}, Plan(10, 0, "uniform", (SIDE, SIDE), shard=2, batch=2))
    made: list[int] = []

    class Counting(Shards):
        def write(self, index: int, *arguments: Any) -> None:
            made.append(index)
            super().write(index, *arguments)

    shards = Counting(tmp_path / "shards", {}, 10, 2)
    for rank in range(3):
        sample_shards(sampler, FakeInception(), shards, Processes(rank, 3))
    assert sorted(made) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(("arguments", "message"), [
    (("--reference", "val"), "val: holds pictures, the reference of reconstructions (rFID); generated samples"),
    (("--reference", "val.npz"), "val.npz: holds pictures, the reference of reconstructions"),
    (("--reference", "features.npz"), "features.npz: holds pictures, the reference of reconstructions"),
    (("--reference", "nowhere.npz"), "nowhere.npz: no such file"),
    (("--reference", "large.npz"), "have sizes 16x16 and 32x32"),
    (("--reference", "narrow.npz"), "holds moments of 3 features, and the extractor toy gives 10"),
    (("--reference", "foreign.npz"), "have features toy and inception, which do not compare"),
    (("--reference", "nan.npz"), "nan.npz: holds moments that are not finite numbers; fetch or write it again"),
    (("--save-npz", "samples.zip"), "such files end in .npz"),
    (("--extractor", "inceptoin"), "unknown feature extractor 'inceptoin'; did you mean inception?"),
])
def test_mistakes(model: str, arguments: tuple[str, ...], message: str) -> None:
    pixels = np.zeros((6, SIDE, SIDE, 3), np.uint8)
    Path("val").mkdir()
    np.savez("val.npz", arr_0=pixels)
    PictureSet(FakeInception()(pixels), "toy", (SIDE, SIDE), "val").save(Path("features.npz"))
    np.savez("narrow.npz", mu=np.zeros(3), sigma=np.eye(3), extractor="toy")
    np.savez("foreign.npz", mu=np.zeros(10), sigma=np.eye(10))              # names no extractor: Inception's
    np.savez("nan.npz", mu=np.full(10, np.nan), sigma=np.eye(10), extractor="toy")
    virtual_file(Path("large.npz"), 32)
    result = imagenet("--model", model, "--num", "6", *arguments, code=2)
    assert message in result.stderr and result.stderr.count("arimg: error: ") == 1
    if "do not compare" in message or "have sizes" in message:
        assert not list(Path("home").glob("evals/*/*")), "known before the first sample is painted"


def test_a_training_reference_is_refused_for_reconstructions() -> None:
    virtual_file(Path("virtual.npz"))
    with pytest.raises(InputError, match="the reference of generated samples .FID.; reconstructions are measured"):
        reconstruction_reference(Path("virtual.npz"), FakeInception())
    assert len(generation_reference(Path("virtual.npz"), FakeInception()).pool.mean_C) == 10


def test_a_model_of_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads captions"):
        Sampler(toy_pipeline(conditioning="text"), {}, Plan(4, 0, "uniform", (16, 16)))


def test_damaged_pictures() -> None:
    np.savez("float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(InputError, match="arr_0 is float64 of shape .2, 4, 4, 3.; pictures are uint8"):
        open_npz(Path("float.npz"))
    np.savez("good.npz", arr_0=np.zeros((9, 4, 4, 3), np.uint8))
    assert [len(batch) for batch in open_npz(Path("good.npz")).batches(4)] == [4, 4, 1]
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:200])
    with pytest.raises(InputError, match="cut.npz: not an .npz file, or damaged"):
        open_npz(Path("cut.npz"))


# ---------------------------------------------------------------------------------------------------------------------
# At length


def peak(number: int, folder: Path) -> tuple[int, int]:
    """The most bytes at once: of tensors, over sampling and figures, and of arrays and objects, over sampling."""
    sampler = Sampler(toy_pipeline(control=None), {}, Plan(number, 0, "uniform", (SIDE, SIDE), shard=100, batch=50))
    shards = Shards(folder, {}, number, 100)
    law = generation_reference(virtual_file(folder / "virtual.npz"), FakeInception())

    def whole() -> int:
        tracemalloc.start()
        sample_shards(sampler, FakeInception(), shards, Processes())
        objects = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        evaluate_samples(sampler, FakeInception(), shards, law, rounds=1)
        return objects
    return peak_memory(torch.device("cpu"), whole)


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    peak(200, tmp_path / "first")           # caches and imports
    (tensors, objects), (few_tensors, few_objects) = peak(2000, tmp_path / "many"), peak(200, tmp_path / "few")
    assert tensors <= 1.02 * few_tensors and objects <= few_objects + 200_000, "2,000 pictures are 1.5 MB"


@pytest.mark.slow
def test_300_pictures_of_the_embedded_model() -> None:
    """On 1 and on 2 processes, and after a kill."""
    virtual_file(Path("virtual.npz"), 128)
    common = ["--model", "emoji", "-n", "300", "--shard", "50", "--batch", "25", "--reference", "virtual.npz",
              "--cfg", "1", "--decoder", "ar", "--rounds", "2", "--json", "report.json"]
    assert program(*common, "--work", "one", die_after=2).returncode == -signal.SIGKILL
    done = program(*common, "--work", "one")
    assert done.returncode == 0, done.stderr
    one = read_report()
    done = program(*common, "--work", "two", processes=2)
    assert done.returncode == 0, done.stderr
    two = read_report()
    assert [report["protocol"]["work"].pop("processes") for report in (one, two)] == [1, 2]
    assert two == one


@pytest.fixture
def converted(tmp_path: Path) -> str:
    """A pipeline folder of toy LlamaGen files."""
    from tests.interop.test_convert import fixture

    vq = VQConfig(codebook_size=96, base_channels=32, multipliers=(1, 1, 1, 1, 1), res_blocks=1, z_channels=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({"model": {**VQTokenizer(vq).state_dict(), "quantize.codebook_used": torch.zeros(65536)}},
                   tmp_path / "vq_ds16_c2i.pt")
    torch.save({"model": fixture("llamagen_gpt_c2i")[0]}, tmp_path / "c2i_B_256.pt")
    return str(convert("llamagen", [tmp_path / "vq_ds16_c2i.pt", tmp_path / "c2i_B_256.pt"], tmp_path / "c2i",
                       heads=4, image_size=64))


@pytest.mark.slow
def test_a_converted_llamagen_is_killed_and_resumed(converted: str) -> None:
    virtual_file(Path("virtual.npz"), 32)
    common = [*options(converted, 256, 32), "--work", "shards", "--size", "32"]
    assert program(*common, die_after=3).returncode == -signal.SIGKILL
    done = program(*common)
    assert done.returncode == 0, done.stderr
    report = read_report()
    assert len(list(Path("shards").glob("features-*.npz"))) == 8
    assert {"fd_toy", "sfd_toy", "is_toy", "precision_toy", "recall_toy"} <= set(report["results"]["samples"])
    assert report["protocol"]["number"] == 256 and report["protocol"]["size"] == [32, 32]
    assert len(report["protocol"]["weights_sha256"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Settings in files


def test_files_of_settings_are_defaults(model: str) -> None:
    Path("run.yaml").write_text(f"model: {model}\nextractor: toy\nnum: 6\nseed: 3\ncfg: 1.5\ntop_k: 7\n")
    result = CliRunner().invoke(main, ["eval", "imagenet", "--config", "run.yaml", "--seed", "4", "--json", "a.json"])
    assert result.exit_code == 0, result.stderr
    protocol = read_report("a.json")["protocol"]
    assert (protocol["number"], protocol["seed"]) == (6, 4), "the command line wins"
    assert (protocol["options"]["cfg"], protocol["options"]["top_k"]) == (1.5, 7)


@pytest.mark.parametrize(("text", "message"), [
    ("classs: uniform", "run.yaml: unknown key 'classs'; did you mean classes"),
    ("model: ${oc.env:HOME}", "interpolations are refused"),
    ("num: many", "'many' is not a valid integer"),
    ("- 1", "holds a list or a bare value"),
])
def test_mistakes_in_files_of_settings(text: str, message: str) -> None:
    Path("run.yaml").write_text(text)
    assert message in imagenet("--config", "run.yaml", code=2).stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_are_read(path: Path) -> None:
    """As far as the model, which is not here."""
    command = path.name.partition("-")[0]
    written = [line.split()[-1] for line in path.read_text().splitlines() if line.startswith("reference: ")]
    for name in written:
        virtual_file(Path(name))
    result = CliRunner().invoke(main, ["eval", command, "--config", str(path)])
    assert result.exit_code == 2 and "unknown model 'c2i" in result.stderr
