"""Segmentation maps: palettes, label maps, and extraction with toy SegFormer and Mask2Former models built here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.control import base, seg
from arimg.control.palettes import PALETTES
from arimg.errors import CheckpointError, InputError, MissingExtraError, UnknownNameError
from arimg.images import load_image

transformers = pytest.importorskip("transformers")


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Palettes and label maps


def test_palettes():
    ade, coco = PALETTES["ade20k"], PALETTES["coco-stuff"]
    assert ade.shape == (150, 3) and coco.shape == (171, 3) and ade.dtype == coco.dtype == np.uint8
    assert ade[[0, 1, 2, 4, 12, 149]].tolist() == [
        [120, 120, 120], [180, 120, 120], [6, 230, 230], [4, 200, 3], [150, 5, 61], [92, 0, 255]]
    assert coco[[0, 2, 80, 170]].tolist() == [[0, 192, 64], [0, 64, 96], [0, 192, 0], [64, 64, 0]]
    assert not (ade == 0).all(axis=1).any(), "black means no label"


def test_label_map_gets_its_colours():
    labels = Image.fromarray(np.array([[0, 1], [149, 255]], np.uint8))
    for image in (labels, load_image(labels)):           # one channel, and what load_image makes of it
        colours = np.array(base.build("seg", source="labels")(image))
        assert colours.tolist() == [[[120, 120, 120], [180, 120, 120]], [[92, 0, 255], [0, 0, 0]]]


def test_palette_png_gives_its_class_numbers():
    labels = Image.new("P", (2, 1))
    labels.putpalette([9, 9, 9, 200, 100, 50])
    labels.putpixel((1, 0), 1)
    assert np.array(base.build("seg", source="labels")(labels))[0].tolist() == [[120, 120, 120], [180, 120, 120]]


def test_classes_may_count_from_one():
    labels = Image.fromarray(np.array([[0, 1, 150]], np.uint8))
    colours = np.array(base.build("seg", source="labels", first=1)(labels))
    assert colours[0].tolist() == [[0, 0, 0], [120, 120, 120], [92, 0, 255]]
    with pytest.raises(InputError, match="label map holds 150; the palette has classes 0 to 149.*first=1"):
        base.build("seg", source="labels")(labels)


def test_coco_stuff_has_more_classes():
    labels = Image.fromarray(np.array([[170]], np.uint8))
    assert np.array(base.build("seg", source="labels", palette="coco-stuff")(labels))[0, 0].tolist() == [64, 64, 0]


def test_wrong_options(photo):
    with pytest.raises(UnknownNameError, match="unknown seg source 'label'; did you mean labels"):
        base.build("seg", source="label")
    with pytest.raises(UnknownNameError, match="unknown seg palette 'ade'; did you mean ade20k"):
        base.build("seg", source="labels", palette="ade")
    with pytest.raises(InputError, match="seg first is 2"):
        base.build("seg", source="labels", first=2)
    with pytest.raises(InputError, match="a colour map needs no extraction"):
        base.build("seg", source="labels")(photo)


# ---------------------------------------------------------------------------------------------------------------------
# Extraction


def save_segformer(folder: Path, classes: int = 5) -> None:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=classes)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_mask2former(folder: Path) -> None:
    pytest.importorskip("scipy")                         # which transformers' Mask2Former needs for its loss
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4, num_labels=5)
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    transformers.Mask2FormerImageProcessor(size={"height": 32, "width": 32}, size_divisor=32).save_pretrained(folder)


def test_pixel_classes_of_a_segformer(photo, tmp_path):
    save_segformer(tmp_path)
    extractor = base.build("seg", model=tmp_path)
    colours = np.array(extractor(photo))
    with torch.no_grad():
        logits = extractor.network(**extractor.processor(images=photo, return_tensors="pt")).logits
    logits = torch.nn.functional.interpolate(logits, (40, 56), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(colours, PALETTES["ade20k"][logits[0].argmax(0).numpy()])


def test_mask_classes_of_a_mask2former(photo, tmp_path):
    save_mask2former(tmp_path)
    colours = np.array(base.build("seg", model=str(tmp_path), palette="coco-stuff")(photo))
    assert colours.shape == (40, 56, 3)
    assert {tuple(c) for c in colours.reshape(-1, 3)} <= {tuple(c) for c in PALETTES["coco-stuff"][:5]}


def test_models_that_do_not_fit(tmp_path):
    transformers.DetrConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is of kind 'detr', which does no semantic segmentation"):
        base.build("seg", model=str(tmp_path))
    save_segformer(tmp_path, classes=160)
    with pytest.raises(CheckpointError, match="has 160 classes, palette ade20k has 150 colours"):
        base.build("seg", model=str(tmp_path))
    assert base.build("seg", model=str(tmp_path), palette="coco-stuff")


def test_a_model_that_needs_another_package(monkeypatch, tmp_path):
    save_segformer(tmp_path)

    def no_scipy(*args, **kwargs):
        raise ImportError("\nthe model requires the scipy library\n")
    monkeypatch.setattr(transformers.AutoModelForSemanticSegmentation, "from_pretrained", no_scipy)
    with pytest.raises(CheckpointError, match=r"requires the scipy library\); type: pip install 'arimg\[control\]'"):
        base.build("seg", model=tmp_path)


def test_missing_model_and_missing_extra(monkeypatch):
    with pytest.raises(CheckpointError, match="model folder './nowhere' does not exist"):
        base.build("seg", model="./nowhere")
    monkeypatch.setattr("arimg.control.pretrained.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="segmentation needs transformers"):
        base.build("seg")
    status = seg.Segmentation.status()
    assert not status.ready and "source=labels" in status.detail
