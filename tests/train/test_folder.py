"""Folders of classes, crops and buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import ten_crop as torchvision_ten_crop

from arimg.errors import ArimgError, ConfigError, InputError
from arimg.images import center_crop_adm
from arimg.train.crops import ENDLESS, Crop, bucket_sizes, cover, random_crop, ten_crop
from arimg.train.data import Feed, Loader
from arimg.train.data_config import BucketConfig, CropConfig, DataConfig
from arimg.train.sources import CorruptSample, FolderSource, Split, open_splits
from tests.train.toy_sources import CLASSES, number_of, picture, write_folder


def test_classes_are_the_sorted_folders_and_captions_lie_beside_the_pictures(tmp_path: Path) -> None:
    source = FolderSource(write_folder(tmp_path / "data"))
    (tmp_path / "data" / ".hidden").mkdir()
    assert len(source) == 12 and source.class_names == CLASSES
    numbers = [number_of(source.image(i)) for i in range(12)]
    assert sorted(numbers) == list(range(12)) and numbers != sorted(numbers), "one fixed shuffled order"
    assert source.labels().tolist() == [number % 3 for number in numbers]
    assert source.caption(5) == f"a {CLASSES[numbers[5] % 3]}. On grass."
    assert source.key(0).endswith(f"{numbers[0]:03d}.png")
    again = FolderSource(tmp_path / "data")
    assert again.files == source.files and again.fingerprint == source.fingerprint
    (tmp_path / "data" / "cat" / "more.jpg").write_bytes(b"")
    assert FolderSource(tmp_path / "data").fingerprint != source.fingerprint


def test_unreadable_pictures_and_folders_without_pictures(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 3)
    (folder / "cat" / "000.png").write_bytes(b"no picture")
    (folder / "dog" / "001.txt").write_bytes(b"\xff")
    source = FolderSource(folder)
    bad = source.files.index("cat/000.png")
    with pytest.raises(CorruptSample, match="cat/000.png.*not a picture"):
        source.image(bad)
    with pytest.raises(CorruptSample, match="dog/001.txt"):
        source.caption(source.files.index("dog/001.png"))
    for path in (tmp_path / "nowhere", tmp_path / "data" / "emu"):
        with pytest.raises(InputError, match="holds no pictures in sub-folders"):
            FolderSource(path)


def test_validation_must_have_the_same_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    other = write_folder(tmp_path / "other", 2)
    with pytest.raises(ConfigError, match="data.validation=.*other classes"):
        open_splits(DataConfig(source="folder", folder=str(folder), validation=str(other), crop=CropConfig(size=16)))
    train, held_out = open_splits(DataConfig(source="folder", folder=str(folder), crop=CropConfig(size=16)))
    assert list(train.indices) == list(range(11)) and list(held_out.indices) == [11]
    with pytest.raises(InputError, match="holds 1 sample"):
        open_splits(DataConfig(source="folder", folder=str(write_folder(tmp_path / "one", 1)),
                               crop=CropConfig(size=16)))


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    source = FolderSource(write_folder(tmp_path / "data"))
    batches = []
    for workers in (1, 3):
        config = DataConfig(source="folder", folder="x", batch_size=5, workers=workers,
                            crop=CropConfig("random", 16))
        feed = Feed(Loader(config, Split(source, range(12)), 3), Crop(config.crop, True))
        batches.append([feed.batch(step, 0, (16, 16)) for step in range(3)])
    for one, other in zip(*(sum(batch, []) for batch in batches)):
        assert (one.index, one.variant) == (other.index, other.variant)
        assert np.array_equal(one.pixels_HW3, other.pixels_HW3)
    assert len({example.variant for batch in batches[0] for example in batch}) == 15, "every crop is new"


def test_balanced_order_draws_rare_classes_more_often_and_needs_classes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 12)
    for number in (0, 3, 6):
        (folder / "cat" / f"{number:03d}.png").unlink()
    source = FolderSource(folder)
    config = DataConfig(source="folder", folder="x", batch_size=200, order="balanced", crop=CropConfig(size=16))
    loader = Loader(config, Split(source, range(9)), 0)
    share = (source.labels()[loader.indices(0, 0)] == 0).mean()
    assert abs(share - 1 / (1 + 2 + 2)) < 0.08, "sqrt of 1, 4, 4"
    source._labels = np.full(9, -1)
    with pytest.raises(ConfigError, match="some samples have no class"):
        Loader(config, Split(source, range(9)), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Crops


def test_the_ten_crops_are_those_of_torchvision_on_adms_centre_square() -> None:
    image = picture(4).resize((90, 70))
    square = center_crop_adm(image, int(32 * 1.1))
    for variant, expected in enumerate(torchvision_ten_crop(square, [32, 32])):
        assert np.array_equal(np.asarray(ten_crop(image, 32, 1.1, variant)), np.asarray(expected)), variant


def test_centre_crop_and_its_mirror_image() -> None:
    crop = Crop(CropConfig("center", 24), True)
    image, expected = picture(3), center_crop_adm(picture(3), 24)
    assert crop.count(True) == crop.count(False) == 2
    assert np.array_equal(crop(image, 0, 0, (24, 24)), np.asarray(expected))
    assert np.array_equal(crop(image, 0, 1, (24, 24)), np.asarray(ImageOps.mirror(expected)))
    assert Crop(CropConfig("center", 24), False).count(True) == 1


def test_variants_of_a_cache_and_of_endless_crops() -> None:
    ten = Crop(CropConfig("ten", 16, ratios=(1.1, 1.05)), True)
    assert ten.count(True) == 20 and ten.held_out == 4 and ten.tag == "ten-16-1.1-1.05"
    random = Crop(CropConfig("random", 16, count=6), True)
    assert random.count(True) == 6 and random.count(False) == ENDLESS and random.tag == "random-16-6"
    image = picture(1).resize((60, 40))
    crops = {random(image, 3, variant, (16, 16)).tobytes() for variant in range(6)}
    assert len(crops) == 6 and random(image, 3, 2, (16, 16)).tobytes() in crops
    assert random(image, 4, 2, (16, 16)).tobytes() not in crops
    assert len({crop.tag for crop in (ten, random, Crop(CropConfig("random", 16, count=6), False))}) == 3


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (64, 16)])
def test_random_crops_hold_most_of_the_picture(size: tuple[int, int]) -> None:
    image = picture(2).resize((120, 100))
    for seed in range(5):
        crop = random_crop(image, size, np.random.default_rng(seed))
        assert crop.size == size[::-1]
    scaled = cover(image, size, 1.25)
    assert scaled.height >= size[0] * 1.25 and scaled.width >= size[1] * 1.25
    assert scaled.height < size[0] * 1.25 + 1 or scaled.width < size[1] * 1.25 + 1, "no larger than needed"


def test_a_window_is_cut_at_the_pictures_own_scale() -> None:
    crop = Crop(CropConfig("window", 16), False)
    pixels = np.asarray(picture(8))
    window = crop(picture(8), 0, 5, (16, 16))
    places = [(top, left) for top in range(pixels.shape[0] - 15) for left in range(pixels.shape[1] - 15)]
    assert any(np.array_equal(window, pixels[top:top + 16, left:left + 16]) for top, left in places)
    with pytest.raises(ConfigError, match="a window of 16x16 does not fit a picture of 8x8; use.*random"):
        crop(Image.new("RGB", (8, 8)), 0, 0, (16, 16))


def test_controlars_sizes_are_bound_by_the_product_of_the_sides() -> None:
    sizes = bucket_sizes(BucketConfig(), 16)
    assert {(384, 384), (384, 1024), (1024, 576), (768, 768)} <= set(sizes) and (784, 768) not in sizes
    assert (1024, 1024) not in sizes, "defect 16: the original compared the sum, and drew this size alone"
    assert all(h % 16 == w % 16 == 0 and h * w <= 2304 * 256 and min(h, w) >= 384 for h, w in sizes)
    with pytest.raises(ConfigError, match="step=24: must be a multiple of the tokenizer's 16"):
        bucket_sizes(BucketConfig(384, 768, 24), 16)
    with pytest.raises(ConfigError, match="max_tokens=100: even 384x384 pixels make 576"):
        bucket_sizes(BucketConfig(max_tokens=100), 16)


@pytest.mark.parametrize(("changes", "message"), [
    ({"source": "foldr"}, "unknown data.source 'foldr'; did you mean folder"),
    ({"source": "folder"}, "data.folder: is empty"),
    ({"source": "folder", "folder": "x"}, "data.crop.size: is 0"),
    ({"order": "epoch"}, "unknown data.order 'epoch'; did you mean epochs"),
    ({"workers": 0}, "workers=0: all must be at least 1"),
    ({"source": "shards", "folder": "x", "crop": CropConfig(size=8), "cache": "y", "buckets": BucketConfig()},
     "no cache fits"),
])
def test_settings_that_cannot_work(changes: dict, message: str) -> None:
    with pytest.raises(ArimgError, match=message) as caught:
        DataConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"kind": "centre"}, {"size": -1}, {"ratios": ()}, {"ratios": (0.9,)},
                                      {"count": 0}])
def test_crops_that_cannot_work(settings: dict) -> None:
    with pytest.raises(ArimgError):
        CropConfig(**settings)


@pytest.mark.parametrize("settings", [{"step": 0}, {"min_side": 400, "step": 32}, {"max_side": 100}])
def test_buckets_that_cannot_work(settings: dict) -> None:
    with pytest.raises(ConfigError, match="data.buckets"):
        BucketConfig(**settings)


def test_crops_are_ready_for_the_tokenizer() -> None:
    pixels = Crop(CropConfig("random", 16), True)(picture(0), 0, 0, (16, 16))
    assert pixels.dtype == np.uint8 and torch.from_numpy(np.stack([pixels])).shape == (1, 16, 16, 3)
