"""MAR's files and constructor arguments as ours; state-dict keys agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from arimg.errors import CheckpointError
from arimg.presets import MAR_PRESETS

_RENAMED = {
    "patch_size": "patch", "vae_embed_dim": "latent_channels", "encoder_embed_dim": "encoder_dim",
    "encoder_depth": "encoder_layers", "encoder_num_heads": "encoder_heads", "decoder_embed_dim": "decoder_dim",
    "decoder_depth": "decoder_layers", "decoder_num_heads": "decoder_heads", "mlp_ratio": "mlp_ratio",
    "class_num": "num_classes", "buffer_size": "buffer", "norm_eps": "norm_eps", "label_drop_prob": "class_dropout",
    "attn_dropout": "attention_dropout", "proj_dropout": "dropout",
}
_HEAD = {"diffloss_d": "layers", "diffloss_w": "width", "num_sampling_steps": "steps"}
_TRANSLATED = ("img_size", "vae_stride")
_WITHOUT_EFFECT = ("diffusion_batch_mul", "grad_checkpointing", "mask_ratio_min",   # training only
                   "seq_len", "token_dim", "head", "schedule")                      # said by the others


def is_mar(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a MAR transformer."""
    return "diffusion_pos_embed_learned" in state


def mar_config_from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for MARConfig (a dict for `head`) from those of the original's class. Raises CheckpointError on
    unknown ones."""
    unknown = sorted(set(config) - set(_RENAMED) - set(_HEAD) - set(_TRANSLATED) - set(_WITHOUT_EFFECT))
    if unknown:
        raise CheckpointError(f"unknown model arguments {', '.join(unknown)}; known are those of MAR's class")
    result = {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    result["grid"] = config.get("img_size", 256) // config.get("vae_stride", 16) // config.get("patch_size", 1)
    result["head"] = {ours: config[theirs] for theirs, ours in _HEAD.items() if theirs in config}
    return result


def infer_mar_config(state: Mapping[str, Tensor], latent_channels: int, heads: int | None = None) -> dict[str, Any]:
    """Keyword arguments for MARConfig that the shapes speak for, given the tokenizer's channels.

    `heads` is needed for sizes without a preset. Raises CheckpointError when a tensor that shows a size is missing,
    does not fit the tokenizer, or the heads are unknown.
    """
    names = ("z_proj.weight", "decoder_embed.weight", "class_emb.weight", "diffusion_pos_embed_learned",
             "encoder_pos_embed_learned", "encoder_blocks.0.mlp.fc1.weight", "diffloss.net.input_proj.weight")
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"MAR weights: {', '.join(missing)} missing, so the sizes cannot be read; give a "
                              "complete file")
    encoder, channels = state["z_proj.weight"].shape
    decoder, length = state["decoder_embed.weight"].shape[0], state["diffusion_pos_embed_learned"].shape[1]
    patch, grid = isqrt(channels // latent_channels), isqrt(length)
    if patch ** 2 * latent_channels != channels or grid ** 2 != length:
        raise CheckpointError(f"MAR weights: {length} tokens of {channels} numbers do not come from a tokenizer of "
                              f"{latent_channels} channels; give the tokenizer that the model was trained with")
    layers = {part: _count(state, rf"{part}_blocks\.(\d+)\.") for part in ("encoder", "decoder")}
    heads = heads or _preset_heads(encoder, layers["encoder"])
    return {
        "latent_channels": latent_channels, "patch": patch, "grid": grid, "encoder_dim": encoder,
        "encoder_layers": layers["encoder"], "encoder_heads": heads, "decoder_dim": decoder,
        "decoder_layers": layers["decoder"], "decoder_heads": heads,
        "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / encoder,
        "buffer": state["encoder_pos_embed_learned"].shape[1] - length,
        "num_classes": state["class_emb.weight"].shape[0],
        "head": {"width": state["diffloss.net.input_proj.weight"].shape[0],
                 "layers": _count(state, r"diffloss\.net\.res_blocks\.(\d+)\.")}}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _preset_heads(dim: int, layers: int) -> int:
    for preset in MAR_PRESETS.values():
        if (preset.dim, preset.layers) == (dim, layers):
            return preset.heads
    raise CheckpointError(f"MAR weights of width {dim} with {layers} layers are no published size, and weights do not "
                          "tell the number of heads; give it with --heads")
