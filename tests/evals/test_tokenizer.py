"""Tokenizers measured batch by batch: folders of pictures, other sizes, LPIPS, and which reference is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import arimg
from arimg.checkpoints import load_component
from arimg.cli import main
from arimg.data import to_images
from arimg.evals.extractors import metric_name
from arimg.evals.picture_sets import PictureSet, figures, load_pictures
from arimg.evals.references import write_reference
from arimg.evals.tokenizer import FolderPictures, Judges, evaluate_tokenizer
from arimg.evals.tokenizer_metrics import ssim
from arimg.features import VGG16
from arimg.images import center_crop_adm, load_image
from arimg.registry import EXTRACTORS
from tests.evals.fake import FakeInception
from tests.toy import toy_folder, toy_pipeline
from tests.toy_continuous import toy_continuous_pipeline


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tokenizer")
    toy_folder(home / "model")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(20, 30), (40, 24), (16, 16), (50, 50), (18, 64), (33, 17)]):
        folder = home / "val" / f"n{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
    return home


@pytest.fixture(autouse=True)
def toy_extractor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(EXTRACTORS.entries, "toy", "tests.evals.fake:FakeInception")
    monkeypatch.chdir(tmp_path)


def tokenizer(places: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["eval", "tokenizer", "--model", str(places / "model"), "--pictures",
                                       str(places / "val"), "--extractor", "toy", "--size", "16", *arguments])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def measured(places: Path, *arguments: str) -> dict[str, Any]:
    tokenizer(places, *arguments, "--json", "report.json")
    return json.loads(Path("report.json").read_text())


def test_published_settings_measure_a_toy(places: Path) -> None:
    config = Path(arimg.__file__).parents[1] / "configs/eval/tokenizer-llamagen-vq16.yaml"
    protocol = measured(places, "--config", str(config), "--measured-size", "8")["protocol"]
    assert (protocol["pictures"], protocol["size"], protocol["measured_size"], protocol["extractor"]["name"]) == (
        6, 16, 8, "toy")


def test_a_folder_is_cropped_as_adm_does_and_compared_with_itself(places: Path) -> None:
    report = measured(places)
    figures_ = report["results"]["reconstructions"]
    assert {"psnr", "ssim", "usage", "perplexity", "f1", "fd_toy", "kid_toy"} <= set(figures_)
    protocol = report["protocol"]
    assert (protocol["pictures"], protocol["reference_pictures"], protocol["size"], protocol["measured_size"]) == (
        6, 6, 16, 16)
    files = sorted((places / "val").rglob("*.png"))
    cropped = np.stack([np.asarray(center_crop_adm(load_image(path), 16)) for path in files])
    np.savez("val.npz", arr_0=cropped)
    again = measured(places, "--reference", "val.npz")
    assert again["results"]["reconstructions"]["fd_toy"]["value"] == pytest.approx(figures_["fd_toy"]["value"])


def test_the_originals_as_samples_leave_no_distance(places: Path) -> None:
    class Copy(torch.nn.Module):
        """Returns what it was given."""

        vocab_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, images: torch.Tensor) -> Any:
            self.images = images
            return type("Encoded", (), {"codes_BL": torch.zeros(len(images), 4, dtype=torch.int64), "grid": (2, 2)})

        def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            return self.images

    originals = FolderPictures.below(places / "val", None, 16, 16)
    found = evaluate_tokenizer(Copy(), originals, Judges(FakeInception()), 0).results["reconstructions"]
    assert found["psnr"].value == 100 and found["ssim"].value == pytest.approx(1) and found["usage"] == 0.25
    assert found["fd_toy"].value == pytest.approx(0, abs=1e-6)


def test_a_larger_size_is_measured_at_a_smaller_one(places: Path) -> None:
    report = measured(places, "--size", "32", "--measured-size", "16")
    assert (report["protocol"]["size"], report["protocol"]["measured_size"]) == (32, 16)
    assert report["results"]["reconstructions"]["fd_toy"] != measured(places)["results"]["reconstructions"]["fd_toy"]


def test_a_continuous_tokenizer_has_no_codes(places: Path) -> None:
    """Mean and deviation of its numbers stand where a codebook's usage would."""
    toy_continuous_pipeline("masked").to(torch.float32).save_pretrained("kl")
    tokenizer(places, "--model", "kl", "--json", "report.json")
    figures_ = json.loads(Path("report.json").read_text())["results"]["reconstructions"]
    assert {"psnr", "ssim", "f1", "fd_toy", "latent_mean", "latent_std"} <= set(figures_) and "usage" not in figures_
    network = load_component(Path("kl/tokenizer"), torch.float32)
    files = sorted((places / "val").rglob("*.png"))
    pixels = np.stack([np.asarray(center_crop_adm(load_image(path), 16)) for path in files])
    with torch.no_grad():
        latents = network.encode(to_images(pixels)).double()
    assert figures_["latent_mean"]["value"] == pytest.approx(float(latents.mean()), abs=1e-5)
    assert figures_["latent_std"]["value"] == pytest.approx(float(latents.std(correction=0)), rel=1e-4)


def test_lpips_with_weights_given(places: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(VGG16().state_dict(), "vgg16.pth")
        heads = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(VGG16.channels)}
    torch.save(heads, "vgg.pth")
    figures_ = measured(places, "--lpips", "vgg16.pth", "vgg.pth", "-n", "2")["results"]["reconstructions"]
    assert figures_["lpips"]["value"] > 0


def test_rfid_is_the_name_with_inception_alone() -> None:
    assert metric_name("rfid", "inception") == "rfid" and metric_name("rfid", "effnet_lite0") == "fd_effnet_lite0"
    assert metric_name("sfid", "toy") == "sfd_toy" and metric_name("precision", "toy") == "precision_toy"


def test_mistakes(places: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    write_reference(Path("VIRTUAL.npz"), PictureSet(FakeInception()(pixels), "toy", (16, 16), ""), pixels)
    line = tokenizer(places, "--reference", "VIRTUAL.npz", code=2).stderr
    assert "holds statistics of a training set, the reference of generated samples (FID); reconstructions" in line
    assert "-n 7: " in tokenizer(places, "-n", "7", code=2).stderr
    assert "no picture below it" in tokenizer(places, "--pictures", str(places / "model"), code=2).stderr
    np.savez("large.npz", arr_0=pixels.repeat(2, 1).repeat(2, 2))
    assert "have sizes 16x16 and 32x32" in tokenizer(places, "--reference", "large.npz", code=2).stderr
    assert "weights 'b.pth' do not exist" in tokenizer(places, "--lpips", "a.pth", "b.pth", code=2).stderr


def test_ssim_needs_room_for_its_window() -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    assert ssim(pixels, pixels) == {}
    assert ssim(np.zeros((2, 11, 11, 3), np.uint8), np.zeros((2, 11, 11, 3), np.uint8))["ssim"].tolist() == [1, 1]


def test_reference_command_writes_adm_layout(places: Path) -> None:
    Path("train").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(f"train/{number}.png")
    result = CliRunner().invoke(main, ["eval", "reference", "train", "-o", "ref.npz", "--extractor", "toy"])
    assert result.exit_code == 0 and result.stdout == "ref.npz\n"
    with np.load("ref.npz") as file:
        assert np.array_equal(file["arr_0"], pixels)
        assert file["mu"].shape == (10,) and file["sigma_s"].shape == (12, 12)
        np.testing.assert_allclose(file["sigma"], np.cov(FakeInception()(pixels).pool_NC, rowvar=False), rtol=1e-5)
    np.savez("train.npz", arr_0=pixels)
    CliRunner().invoke(main, ["eval", "reference", "train.npz", "-o", "again.npz", "--extractor", "toy"])
    with np.load("again.npz") as again, np.load("ref.npz") as first:
        assert np.array_equal(again["arr_0"], first["arr_0"]) and np.allclose(again["mu"], first["mu"])


def test_statistics_files_keep_all_columns(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    whole = PictureSet(FakeInception()(pixels), "toy", (16, 16), "x")
    whole.save(tmp_path / "x.npz")
    again = load_pictures(tmp_path / "x.npz", FakeInception())
    law = PictureSet(FakeInception()(255 - pixels), "toy", (16, 16), "y").law()
    assert figures(again, law, rounds=2) == figures(whole, law, rounds=2)


def test_toy_pipeline_decodes_latents_as_codes() -> None:
    """What `arimg eval imagenet` relies on: unclipped pictures from latents are those from codes."""
    pipe = toy_pipeline(control=None)
    out = pipe(class_id=[0, 1], output_type="latent")
    direct = pipe.tokenizer.decode_codes(out.codes, (4, 4))
    torch.testing.assert_close(pipe.tokenizer.decode(out.latents), direct, rtol=1e-5, atol=1e-5)
