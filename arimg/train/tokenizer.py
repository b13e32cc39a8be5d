"""Objective `tokenizer`: reconstruct images through the codebook (LlamaGen section 2.1; no adversary yet, so its weight
must be 0)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from arimg.checkpoints import load_component, load_state, save_component
from arimg.data import load_emoji, to_images
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.tokenizers.losses import ImageLossConfig, TokenizerLoss, effnet_loss
from arimg.tokenizers.vq import CodebookUsage, VQConfig, VQTokenizer
from arimg.train.data import balanced_indices, batch_rng, random_crops
from arimg.train.run import RunConfig

_SHOWN = 16


@dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """A tokenizer run on random crops. Raises ConfigError on settings that contradict one another."""

    model: VQConfig = field(default_factory=VQConfig)
    crop: int = 64              # pixels
    loss: ImageLossConfig = ImageLossConfig(l1=1.0, l2=1.0, perceptual=0.0, adversarial=0.0)
    revive_every: int = 20      # steps between revivals of codes unused since the last one
    revive_until: int = 700     # step after which the codebook is left alone
    decoder_only: bool = False  # the codes of every picture stay what they are: a model of them stays valid

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_only and not self.init_from:
            raise ConfigError("decoder_only=true: needs a trained encoder and codebook; give init_from=FOLDER, the "
                              "tokenizer that a run exported")


class TokenizerTask(nn.Module):
    """Loss of one batch of images (B, 3, H, W) in [-1, 1]."""

    def __init__(self, config: TokenizerRun) -> None:
        super().__init__()
        self.tokenizer = VQTokenizer(config.model)
        self.loss = TokenizerLoss(config.loss, effnet_loss() if config.loss.perceptual else None)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and figures."""
        images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        recon_B3HW, codes_BL, losses = self.tokenizer(images_B3HW)
        loss = self.loss.tokenizer_loss(recon_B3HW, images_B3HW, losses, step=0)
        self.last_codes_BL = codes_BL.detach()
        squared_error = F.mse_loss(recon_B3HW.detach(), images_B3HW)
        return loss, {"psnr": -10 * torch.log10(squared_error / 4), "vq": losses.vq.detach()}


class TokenizerObjective:
    """Train a VQ tokenizer on an emoji folder."""

    config_class = TokenizerRun

    def __init__(self, config: TokenizerRun) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.network = TokenizerTask(config)
        if config.init_from:
            load_state(self.network.tokenizer, load_component(config.init_from).state_dict(), config.init_from)
        if config.decoder_only:
            tokenizer = self.network.tokenizer
            for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize):
                part.requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)
        emoji = load_emoji(config.data.path())
        self.images = emoji.images
        self.train_indices = np.flatnonzero(~emoji.held_out)
        self.train_labels = emoji.labels[self.train_indices]
        held_out = np.flatnonzero(emoji.held_out)
        self.shown = held_out[::max(1, len(held_out) // _SHOWN)][:_SHOWN]
        self.usage = CodebookUsage(config.model.codebook_size, window=config.revive_every * self._codes_per_step())

    def _codes_per_step(self) -> int:
        return self.config.data.batch_size * (self.config.crop // self.network.tokenizer.stride) ** 2

    def batch(self, step: int, rank: int, processes: int) -> tuple[Tensor, ...]:
        """(images,)"""
        config = self.config
        rng = batch_rng(config.seed, step, rank)
        chosen = self.train_indices[balanced_indices(self.train_labels, config.data.batch_size, rng)]
        return (to_images(random_crops(self.images, chosen, config.crop, rng)),)

    def after_step(self, step: int, network: TokenizerTask) -> dict[str, float]:
        """Count codes; move the dead ones onto latents of the batch."""
        used = self.usage.update(network.last_codes_BL)
        config = self.config
        if config.decoder_only or step % config.revive_every or step > config.revive_until:
            return {"usage": used}
        with torch.no_grad():
            latents = network.tokenizer.latents(self.batch(step, 0, 1)[0].to(network.last_codes_BL.device))
        generator = torch.Generator(latents.device).manual_seed(self.config.seed * 1_000_003 + step)
        revived = network.tokenizer.quantize.revive(latents, self.usage.dead(), generator)
        return {"usage": used, "revived": revived}

    def state_dict(self) -> dict[str, Any]:
        """The recent codes."""
        return {"recent": self.usage.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.usage.recent = state["recent"]

    @torch.no_grad()
    def sample(self, network: TokenizerTask) -> Image.Image:
        """Held-out originals above their reconstructions."""
        images = to_images(self.images[self.shown]).to(next(network.parameters()).device)
        encoded = network.tokenizer.encode(images)
        recon = network.tokenizer.decode(encoded.latents_BChw)
        return make_grid([to_pil(image.cpu()) for image in torch.cat([images, recon])], columns=len(self.shown))

    def export(self, network: TokenizerTask, folder: Path) -> None:
        """The tokenizer as a component folder."""
        save_component(network.tokenizer, folder / "tokenizer", torch.float32)
