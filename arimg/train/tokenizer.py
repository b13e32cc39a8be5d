"""Objective `tokenizer`: reconstruct images through the codebook, from some step on against a discriminator (LlamaGen
section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from arimg.checkpoints import load_component, load_state, save_component
from arimg.data import to_images
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.tokenizers.losses import (Adversary, ImageLossConfig, PatchDiscriminator, PerceptualLoss, TokenizerLoss,
                                     effnet_loss, lpips_vgg16)
from arimg.tokenizers.vq import CodebookUsage, VQConfig, VQTokenizer
from arimg.train.crops import Crop
from arimg.train.data import Example, Feed, Loader, processes
from arimg.train.data_config import CropConfig
from arimg.train.objective import Batch, Figures, Losses, Player
from arimg.train.run import AdamWConfig, RunConfig
from arimg.train.sources import EmojiSource, Source, open_splits

_SHOWN = 16
_SMALLEST_JUDGED = 24       # pixels: below, the discriminator has no patch


@dataclass(frozen=True)
class LpipsFiles:
    """Where the weights of LPIPS lie; empty: EfficientNet-Lite0's features stand in."""

    vgg: str = ""               # vgg16-397923af.pth of torchvision
    heads: str = ""             # vgg.pth of LPIPS 0.1

    def __post_init__(self) -> None:
        if bool(self.vgg) != bool(self.heads):
            raise ConfigError("lpips: has one of two files; give both lpips.vgg and lpips.heads, or neither")

    def network(self) -> PerceptualLoss:
        """Raises CheckpointError, MissingExtraError."""
        return lpips_vgg16(Path(self.vgg), Path(self.heads)) if self.vgg else effnet_loss()


@dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """A tokenizer run on the crops that `data.crop` describes. Raises ConfigError on settings that contradict one
    another."""

    model: VQConfig = field(default_factory=VQConfig)
    loss: ImageLossConfig = ImageLossConfig(l1=1.0, l2=1.0, perceptual=0.0, adversarial=0.0)
    lpips: LpipsFiles = field(default_factory=LpipsFiles)
    adversary: AdamWConfig | None = None    # the discriminator's optimiser; None: as the tokenizer's
    revive_every: int = 20      # steps between revivals of codes unused since the last one; 0 = never
    revive_until: int = 700     # step after which the codebook is left alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.buckets or self.data.cache:
            raise ConfigError("data: a tokenizer is trained on crops of one size, cut anew every time; leave "
                              "data.buckets and data.cache out")
        if self.loss.adversarial and 0 < self.data.crop.size < _SMALLEST_JUDGED:
            raise ConfigError(f"data.crop.size={self.data.crop.size}: too small for the discriminator; write at least "
                              f"{_SMALLEST_JUDGED}, or loss.adversarial=0")

    def perceptual(self) -> PerceptualLoss | None:
        """The distance of features that the loss asks for."""
        return self.lpips.network() if self.loss.perceptual else None


class TokenizerTask(nn.Module):
    """Loss of one batch of images (B, 3, H, W) in [-1, 1]."""

    def __init__(self, config: TokenizerRun) -> None:
        super().__init__()
        self.tokenizer = VQTokenizer(config.model)
        self.loss = TokenizerLoss(config.loss, config.perceptual())

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Figures]:
        """Reconstructions, scalar loss without an adversary, figures and the codes."""
        recon_B3HW, codes_BL, losses = self.tokenizer(images_B3HW)
        loss = self.loss(recon_B3HW, images_B3HW, losses)
        squared_error = F.mse_loss(recon_B3HW.detach().float(), images_B3HW)
        return recon_B3HW, loss, {"psnr": -10 * torch.log10(squared_error / 4), "vq": losses.vq, "codes": codes_BL}


class TokenizerObjective:
    """Train a VQ tokenizer on any source (train/sources.py)."""

    config_class = TokenizerRun

    def __init__(self, config: TokenizerRun) -> None:
        self.config = config
        train, held_out = open_splits(config.data)
        torch.manual_seed(config.seed)
        self.network = TokenizerTask(config)
        if config.init_from:
            state = load_component(config.init_from, torch.float32).state_dict()
            load_state(self.network.tokenizer, state, config.init_from)
        self.network.to(memory_format=torch.channels_last)
        self.adversary = Adversary(config.loss, PatchDiscriminator()) if config.loss.adversarial else None
        data, crop = config.data, Crop(config.data.crop, flip=True)
        whole = self._whole_size(train.source)
        self.size = (data.crop.size, data.crop.size) if data.crop.size else whole
        self.feed = Feed(Loader(data, train, config.seed, processes() * config.train.accumulation), crop)
        whole_crop = Crop(CropConfig("center", whole[0]), flip=False)
        self.shown = Feed(Loader(data, held_out, config.seed), whole_crop).held_out(_SHOWN, whole)
        self.usage = CodebookUsage(config.model.codebook_size)

    def players(self) -> dict[str, Player]:
        """The tokenizer, and its adversary if it ever has one."""
        config = self.config
        players = {"tokenizer": Player(self.network, config.optim, config.optim.steps)}
        if self.adversary is not None:
            updates = max(1, config.optim.steps - config.loss.start_step)
            players["adversary"] = Player(self.adversary, config.adversary or config.optim, updates, averaged=False)
        return players

    def batch(self, step: int, micro: int) -> Batch:
        """(images,)"""
        return (stacked(self.feed.batch(step, micro, self.size)),)

    def losses(self, networks: Mapping[str, nn.Module], batch: Batch, step: int) -> tuple[Losses, Figures]:
        """Both sides see the tokenizer and the discriminator as they are before this step."""
        images_B3HW = batch[0].contiguous(memory_format=torch.channels_last)
        recon_B3HW, loss, figures = networks["tokenizer"](images_B3HW)
        if self.adversary is None or not self.adversary.plays(step):
            return {"tokenizer": loss}, figures
        loss = loss + self.adversary.tokenizer_loss(recon_B3HW)
        return {"tokenizer": loss, "adversary": networks["adversary"](recon_B3HW, images_B3HW)}, figures

    def after_step(self, step: int, network: nn.Module, seen: Figures) -> dict[str, float]:
        """Count codes; move the dead ones onto latents of a batch."""
        config = self.config
        assert isinstance(network, TokenizerTask)
        self.usage.window = max(1, config.revive_every) * seen["codes"].numel()
        used = self.usage.update(seen["codes"])
        if not config.revive_every or step % config.revive_every or step > config.revive_until:
            return {"usage": used}
        with torch.no_grad():
            latents = network.tokenizer.latents(self.batch(step, 0)[0].to(seen["codes"].device))
        generator = torch.Generator(latents.device).manual_seed(config.seed * 1_000_003 + step)
        revived = network.tokenizer.quantize.revive(latents, self.usage.dead(), generator)
        return {"usage": used, "revived": revived}

    def state_dict(self) -> dict[str, Any]:
        """The recent codes."""
        return {"recent": self.usage.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.usage.recent = state["recent"]

    def _whole_size(self, source: Source) -> tuple[int, int]:
        """(height, width) at which held-out pictures are shown."""
        if isinstance(source, EmojiSource):
            shape = source.emoji.images.shape
            return int(shape[1]), int(shape[2])
        return self.config.data.crop.size, self.config.data.crop.size

    def _held_out(self, network: nn.Module) -> Tensor:
        return stacked(self.shown).to(next(network.parameters()).device)

    @torch.no_grad()
    def validation_loss(self, network: nn.Module) -> float:
        """The loss without an adversary on held-out pictures."""
        return float(network(self._held_out(network))[1])

    @torch.no_grad()
    def sample(self, network: nn.Module) -> Image.Image:
        """Held-out originals above their reconstructions."""
        assert isinstance(network, TokenizerTask)
        images = self._held_out(network)
        encoded = network.tokenizer.encode(images)
        recon = network.tokenizer.decode(encoded.latents_BChw)
        return make_grid([to_pil(image.cpu()) for image in torch.cat([images, recon])], columns=len(self.shown))

    def export(self, network: nn.Module, folder: Path) -> None:
        """The tokenizer as a component folder."""
        assert isinstance(network, TokenizerTask)
        save_component(network.tokenizer, folder / "tokenizer", torch.float32)


def stacked(examples: Sequence[Example]) -> Tensor:
    """images_B3HW in [-1, 1]."""
    pixels: list[Any] = [example.pixels_HW3 for example in examples]
    return to_images(np.stack(pixels))
