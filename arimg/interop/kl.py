"""MAR's KL autoencoder (`kl16.ckpt`, and others in latent diffusion's layout) as ours, and ours as diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arimg.errors import CheckpointError, ConfigError
from arimg.interop.convnet import convnet_from_ldm, convnet_sizes, is_ldm
from arimg.tokenizers.kl import KLConfig, KLTokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Left out: the adversary and the perceptual network of training files.
_TRAINING = re.compile(r"loss\.")
_DIFFUSERS = (      # in this order
    (r"norm_out\.", "conv_norm_out."),
    (r"mid\.0\.", "mid_block.resnets.0."), (r"mid\.1\.", "mid_block.attentions.0."),
    (r"mid\.2\.", "mid_block.resnets.1."),
    (r"encoder\.conv_blocks\.", "encoder.down_blocks."), (r"decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"\.res\.", ".resnets."), (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.downsample\.", ".downsamplers.0."), (r"\.upsample\.", ".upsamplers.0."),
    (r"\.attn\.", ".attentions."), (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."), (r"\.proj_out\.", ".to_out.0."),
)


def is_kl(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a KL autoencoder in latent diffusion's layout."""
    return is_ldm(state) and "post_quant_conv.weight" in state and "quantize.embedding.weight" not in state


def kl_from_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original keys to ours."""
    return convnet_from_ldm({key: tensor for key, tensor in state.items() if not _TRAINING.match(key)})


def kl_config_from_mar(config: Mapping[str, Any]) -> KLConfig:
    """The config of the original's arguments. Attention stands where the nominal resolution, halved once per level, is
    listed; the size of the image does not matter."""
    nominal = [config["resolution"] // 2 ** level for level in range(len(config["ch_mult"]))]
    levels = tuple(level for level, side in enumerate(nominal) if side in config["attn_resolutions_encoder"])
    return KLConfig(
        base_channels=config["ch"], multipliers=tuple(config["ch_mult"]), res_blocks=config["num_res_blocks"],
        latent_channels=config["embed_dim"], attention_levels=levels, scale=config["latent_scale"])


def infer_kl_config(state: Mapping[str, Tensor]) -> KLConfig:
    """The config that the shapes of an original state dict speak for; the scale is MAR's, tokens are single cells.

    Raises CheckpointError when a tensor that shows a size is missing.
    """
    sizes = convnet_sizes(kl_from_ldm(state), ("post_quant_conv.weight",))
    names = ("base_channels", "multipliers", "res_blocks", "in_channels", "attention_levels",
             "decoder_attention_levels")
    return KLConfig(latent_channels=state["post_quant_conv.weight"].shape[0], **{name: sizes[name] for name in names})


def to_diffusers(tokenizer: KLTokenizer) -> AutoencoderKL:
    """The same network as diffusers' AutoencoderKL, with a copy of the weights; `scale` becomes its `scaling_factor`,
    which its callers apply. Raises ConfigError where that class has no such network."""
    from diffusers import AutoencoderKL

    config = tokenizer.config
    if config.multipliers[0] != 1 or config.patch_size != 1:
        raise ConfigError(f"multipliers={list(config.multipliers)}, patch_size={config.patch_size}: diffusers' "
                          "AutoencoderKL begins at the first level's width and has no patches; both must be 1")
    levels = range(len(config.multipliers))
    down = tuple("AttnDownEncoderBlock2D" if level in config.attention_levels else "DownEncoderBlock2D"
                 for level in levels)
    up = tuple("AttnUpDecoderBlock2D" if level in config.decoder_attention_levels else "UpDecoderBlock2D"
               for level in reversed(levels))
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            in_channels=config.in_channels, out_channels=config.in_channels, down_block_types=down, up_block_types=up,
            block_out_channels=tuple(config.base_channels * multiplier for multiplier in config.multipliers),
            layers_per_block=config.res_blocks, latent_channels=config.latent_channels, norm_num_groups=32,
            scaling_factor=config.scale)
    shapes = autoencoder.state_dict()
    state = {name: tensor.detach().clone().view(shapes[name].shape)        # its attention has matrices, not 1x1 filters
             for key, tensor in tokenizer.state_dict().items() for name in [diffusers_key(key)]}
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.train(tokenizer.training)


def from_diffusers(autoencoder: AutoencoderKL) -> KLTokenizer:
    """The inverse of `to_diffusers`: any AutoencoderKL of Stable Diffusion's kind. Raises CheckpointError on a network
    that ours is not."""
    theirs, state = autoencoder.config, autoencoder.state_dict()
    base = theirs.block_out_channels[0]
    config = KLConfig(
        base_channels=base, multipliers=tuple(width // base for width in theirs.block_out_channels),
        res_blocks=theirs.layers_per_block, latent_channels=theirs.latent_channels, in_channels=theirs.in_channels,
        attention_levels=_attended(theirs.down_block_types),
        decoder_attention_levels=_attended(theirs.up_block_types[::-1]), scale=theirs.scaling_factor)
    with torch.device("meta"):
        tokenizer = KLTokenizer(config)
    names = {key: diffusers_key(key) for key in tokenizer.state_dict()}
    faults = set(names.values()) ^ set(state)
    if faults or theirs.norm_num_groups != 32:
        raise CheckpointError(f"AutoencoderKL: {', '.join(sorted(faults)[:5]) or 'its group norm'} differs from "
                              "Stable Diffusion's network, the only one that is known")
    own = {key: state[name].detach().clone().view(tensor.shape)
           for (key, name), tensor in zip(names.items(), tokenizer.state_dict().values())}
    tokenizer.load_state_dict(own, assign=True)
    return tokenizer.train(autoencoder.training)


def diffusers_key(key: str) -> str:
    """Our key in the layout of AutoencoderKL."""
    for pattern, replacement in _DIFFUSERS:
        key = re.sub(pattern, replacement, key)
    return key


def _attended(blocks: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(level for level, name in enumerate(blocks) if name.startswith("Attn"))
