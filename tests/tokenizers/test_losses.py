"""Losses on reconstructions: perceptual distance, adversary, schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from arimg.errors import CheckpointError, ConfigError, UnknownNameError
from arimg.features import EffnetLite0, FixedNetwork
from arimg.tokenizers.losses import (GAN_LOSSES, Adversary, ImageLossConfig, PatchDiscriminator, PerceptualLoss,
                                     TokenizerLoss, effnet_loss, hinge_discriminator, hinge_generator, lpips_vgg16,
                                     vanilla_discriminator, vanilla_generator)
from arimg.tokenizers.vq import VQLosses

WIDTHS = (64, 128, 256, 512, 512)
TAPS = (3, 8, 15, 22, 29)       # the last activation before each pooling, counted in torchvision's layers


def pair(size: int = 32, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, batch, 3, size, size, generator=generator) * 2 - 1
    return one, other


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual distance


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random weights in the layouts of torchvision's vgg16-397923af.pth and of LPIPS's vgg.pth."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    vgg = {f"features.{key}": tensor for key, tensor in make_layers(cfgs["D"]).state_dict().items()}
    heads = {f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1) for index, width in enumerate(WIDTHS)}
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


@torch.no_grad()
def reference_lpips(files: tuple[Path, Path], one: Tensor, other: Tensor) -> Tensor:
    """The definition, layer by layer, on torchvision's own network."""
    vgg, heads = (torch.load(path, weights_only=True) for path in files)
    layers = make_layers(cfgs["D"])
    layers.load_state_dict({key.removeprefix("features."): value for key, value in vgg.items() if "features" in key})
    mean, deviation = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
    x = (torch.cat([one, other]) - mean[:, None, None]) / deviation[:, None, None]
    total = torch.zeros(len(one))
    for index, layer in enumerate(layers):
        x = layer(x)
        if index in TAPS:
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            head = heads[f"lin{TAPS.index(index)}.model.1.weight"]
            total += F.conv2d((a - b).square(), head).mean((1, 2, 3))
    return total


def test_lpips_equals_its_definition(lpips_files: tuple[Path, Path]) -> None:
    one, other = pair()
    torch.testing.assert_close(lpips_vgg16(*lpips_files)(one, other), reference_lpips(lpips_files, one, other))


def test_defect_05_lpips_stays_in_eval_mode_during_training(lpips_files: tuple[Path, Path]) -> None:
    """In the original `.train()` on the loss module switched the dropout before the heads on again."""
    one, other = pair()
    loss = TokenizerLoss(ImageLossConfig(adversarial=0), lpips_vgg16(*lpips_files)).train()
    assert loss.perceptual is not None and not loss.perceptual.network.training
    for _ in range(2):
        torch.testing.assert_close(loss.perceptual(one, other), reference_lpips(lpips_files, one, other))


def test_lpips_gradients_reach_the_images_only(lpips_files: tuple[Path, Path]) -> None:
    one, other = pair()
    flat = torch.zeros_like(one).requires_grad_()        # a flat picture has pixels whose features are all 0
    lpips = lpips_vgg16(*lpips_files)
    lpips(flat, other).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all() and flat.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_faulty_files(lpips_files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, heads = lpips_files
    with pytest.raises(CheckpointError, match="nowhere.pth.*do not exist"):
        lpips_vgg16(vgg, tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"lin0\.model\.1\.weight is missing.*give the file vgg\.pth of LPIPS"):
        lpips_vgg16(vgg, vgg)
    with pytest.raises(CheckpointError, match="do not fit VGG16"):
        lpips_vgg16(heads, heads)
    wrong = tmp_path / "alex.pth"
    torch.save({"lin0.model.1.weight": torch.zeros(1, 48, 1, 1)}, wrong)
    with pytest.raises(CheckpointError, match=r"of shape \(1, 48, 1, 1\), but \(1, 64, 1, 1\) is needed"):
        lpips_vgg16(vgg, wrong)


class Identity(FixedNetwork):
    """The picture as its own map, twice."""

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        return [images_B3HW, images_B3HW]


def test_perceptual_distance_by_hand() -> None:
    """Orthogonal unit features differ by 1 + 1 at each pixel; scale does not matter; two layers add up."""
    one, other = torch.zeros(2, 1, 3, 2, 2)
    one[:, 0], other[:, 1] = 5.0, 0.1
    assert PerceptualLoss(Identity())(one, other).tolist() == pytest.approx([4.0])
    assert PerceptualLoss(Identity())(one, 2 * one).tolist() == pytest.approx([0.0])
    heads = [torch.tensor([0.5, 0.25, 9.0]), torch.tensor([0.0, 1.0, 9.0])]
    assert PerceptualLoss(Identity(), heads)(one, other).tolist() == pytest.approx([0.75 + 1.0])


def test_effnet_distance() -> None:
    one, other = pair(64)
    loss = effnet_loss()
    loss.train()
    assert isinstance(loss.network, EffnetLite0) and not loss.network.training
    near = one + 0.05 * other
    assert loss(one, one).tolist() == [0, 0]
    assert (loss(one, near) < loss(one, other)).all() and (loss(one, near) > 0).all()
    torch.testing.assert_close(loss(one, other), loss(other, one))
    torch.testing.assert_close(loss(one, other)[1:], loss(one[1:], other[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Adversary


def test_patchgan_of_llamagen() -> None:
    discriminator = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.zeros(2, 3, 64, 80)).shape == (2, 1, 6, 8)
    assert discriminator.main[5].weight.std().item() == pytest.approx(0.02, rel=0.05)
    norm = discriminator.main[9]
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    # real: 0, 0.5, 2 -> 2.5 / 3; fake: 0, 1 -> 1 / 2
    assert hinge_discriminator(real, fake).item() == pytest.approx((2.5 / 3 + 0.5) / 2)
    assert hinge_generator(fake).item() == pytest.approx(1.5)


def test_vanilla_by_hand() -> None:
    real, fake = torch.tensor([math.log(3.0)]), torch.tensor([0.0])         # D says 3/4 and 1/2 real
    assert vanilla_discriminator(real, fake).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert vanilla_generator(real).item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("name", sorted(GAN_LOSSES))
def test_defect_06_arguments_of_the_adversarial_losses(name: str) -> None:
    """With logits and targets swapped, as in the original, being right was not rewarded. The discriminator wants real
    up and fake down, the generator wants fake up."""
    real, fake = torch.tensor([0.3], requires_grad=True), torch.tensor([-0.2], requires_grad=True)
    GAN_LOSSES[name].discriminator(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert real.grad.item() < 0 < fake.grad.item()
    fake.grad = None
    GAN_LOSSES[name].generator(fake).backward()
    assert fake.grad is not None and fake.grad.item() < 0
    sure = torch.tensor([20.0])
    assert GAN_LOSSES[name].discriminator(sure, -sure).item() == pytest.approx(0, abs=1e-6)
    assert GAN_LOSSES[name].discriminator(-sure, sure).item() == pytest.approx(20, abs=1.1)


# ---------------------------------------------------------------------------------------------------------------------
# All together


QUANTISER = VQLosses(vq=torch.tensor(0.5), commit=torch.tensor(0.25), entropy=torch.tensor(-0.125))


def test_defect_07_no_adversary_before_its_start() -> None:
    """The original computed both sides from the first step on and multiplied them by 0; the loop asks `plays` first."""
    adversary = Adversary(ImageLossConfig(start_step=10), PatchDiscriminator(base_channels=4, layers=2))
    assert [adversary.plays(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert not Adversary(ImageLossConfig(adversarial=0, start_step=0), adversary.discriminator).plays(10)


def test_weights_of_both_sides() -> None:
    recon, images = pair()
    judge = PatchDiscriminator(base_channels=4, layers=2).eval()
    config = ImageLossConfig(l1=2, l2=3, perceptual=5, adversarial=0.25, gan="vanilla")
    perceptual = PerceptualLoss(Identity())
    expected = (0.625 + 2 * (recon - images).abs().mean() + 3 * (recon - images).square().mean()
                + 5 * perceptual(recon, images).mean())
    torch.testing.assert_close(TokenizerLoss(config, perceptual)(recon, images, QUANTISER), expected)
    adversary = Adversary(config, judge)
    torch.testing.assert_close(adversary.tokenizer_loss(recon), 0.25 * vanilla_generator(judge(recon)))
    torch.testing.assert_close(adversary(recon, images), 0.25 * vanilla_discriminator(judge(images), judge(recon)))


def test_each_side_moves_its_own_network() -> None:
    images, _ = pair()
    network = nn.Conv2d(3, 3, 1)
    adversary = Adversary(ImageLossConfig(), PatchDiscriminator(base_channels=4, layers=2))
    adversary(network(images), images).backward()
    assert network.weight.grad is None and all(p.grad is not None for p in adversary.parameters())
    adversary.zero_grad()
    adversary.tokenizer_loss(network(images)).backward()
    assert network.weight.grad is not None and all(p.grad is None for p in adversary.parameters())
    assert all(p.requires_grad for p in adversary.parameters())


def test_config_errors() -> None:
    with pytest.raises(UnknownNameError, match="unknown GAN loss 'hing'; did you mean hinge"):
        ImageLossConfig(gan="hing")
    with pytest.raises(ConfigError, match="perceptual=1 needs a network.*set perceptual=0"):
        TokenizerLoss(ImageLossConfig(adversarial=0))
