"""Depth maps, with toy DPT and Depth-Anything models built here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.control import base, depth, pretrained
from arimg.errors import CheckpointError, MissingExtraError

transformers = pytest.importorskip("transformers")


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def save_dpt(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5])
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_depth_anything(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, depth_estimation_type=kind, max_depth=20 if kind == "metric" else 1)
    model = transformers.DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        model.head.conv3.bias += 1                       # the final ReLU would leave a random model flat
    model.save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)


def predicted(extractor: depth.Depth, photo: Image.Image) -> np.ndarray:
    """The network's own answer at the photo's size."""
    with torch.no_grad():
        raw = extractor.network(**extractor.processor(images=photo, return_tensors="pt")).predicted_depth
    size = (photo.height, photo.width)
    return torch.nn.functional.interpolate(raw[None], size, mode="bicubic", align_corners=False)[0, 0].numpy()


def test_inverse_depth_is_scaled_to_the_full_range(photo, tmp_path):
    save_dpt(tmp_path)
    extractor = base.build("depth", model=str(tmp_path))
    near = np.array(extractor(photo))
    assert near.shape == (40, 56, 3) and (near == near[..., :1]).all()
    raw = predicted(extractor, photo)
    expected = 255 * (raw - raw.min()) / (raw.max() - raw.min())
    assert np.abs(near[..., 0] - expected).max() <= 1
    assert near.min() == 0 and near.max() == 255


@pytest.mark.parametrize("kind, direction", [("relative", 1), ("metric", -1)])
def test_near_is_bright_for_inverse_depth_and_for_metres(photo, tmp_path, kind, direction):
    save_depth_anything(tmp_path, kind)
    extractor = base.build("depth", model=tmp_path)
    near, raw = np.array(extractor(photo))[..., 0].ravel(), predicted(extractor, photo).ravel()
    assert raw.max() > raw.min()
    order = np.argsort(raw * direction)
    assert (np.diff(near[order].astype(int)) >= 0).all()


def test_maps_by_hand():
    inverse = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)
    assert np.array(depth.to_map(inverse, metric=False))[..., 0].tolist() == [[0, 64], [128, 255]]
    metres = np.array([[1.0, 2.0], [4.0, 4.0]], np.float32)
    assert np.array(depth.to_map(metres, metric=True))[..., 0].tolist() == [[255, 85], [0, 0]]
    assert not np.array(depth.to_map(np.full((2, 2), 3.0), metric=False)).any()


def test_missing_folder_and_unknown_hub_id_go_to_no_network(monkeypatch, tmp_path):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("went to the network")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(CheckpointError, match="folder '.*nowhere' does not exist"):
        base.build("depth", model=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="type: hf download owner/no-such-model"):
        base.build("depth", model="owner/no-such-model")


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        base.build("depth", model=str(tmp_path))
    assert "\n" not in str(caught.value)
    transformers.SegformerConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is of kind 'segformer', which is not used for depth"):
        base.build("depth", model=str(tmp_path))


def test_truncated_weights(tmp_path):
    save_dpt(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        base.build("depth", model=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(tmp_path):
    save_dpt(tmp_path)
    model = transformers.DPTModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    config = transformers.DPTForDepthEstimation.config_class.from_pretrained(tmp_path)
    config.architectures = ["DPTForDepthEstimation"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks .* weights of DPTForDepthEstimation"):
        base.build("depth", model=str(tmp_path))


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"depth extraction needs transformers.*pip install 'arimg\[control\]'"):
        base.build("depth")
    status = depth.Depth.status()
    assert not status.ready and "pip install 'arimg[control]'" in status.detail


def test_status_reads_the_hub_cache(monkeypatch):
    assert "transformers" in sys.modules
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, file: None)
    assert not depth.Depth.status().ready and f"hf download {depth.DEFAULT_MODEL}" in depth.Depth.status().detail
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, file: f"cache/{file}")
    assert depth.Depth.status().ready
