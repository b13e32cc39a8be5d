"""The released transformers of VAR as ours: dict in, dict out. State-dict keys agree but for the release's buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from arimg.errors import CheckpointError
from arimg.presets import VAR_PRESETS, square_scales

_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")       # computed, or zero
_HEAD_DIM = 64                                                      # of every released size
_SHAPES = ("pos_1LC", "lvl_embed.weight", "word_embed.weight", "class_emb.weight", "head.weight",
           "blocks.0.ffn.fc1.weight")
_RENAMED = {"num_classes": "num_classes", "depth": "layers", "embed_dim": "dim", "num_heads": "heads",
            "mlp_ratio": "mlp_ratio", "norm_eps": "norm_eps", "shared_aln": "shared_adaln",
            "attn_l2_norm": "l2_attention", "V": "vocab_size", "Cvae": "codebook_dim",
            "cond_drop_rate": "class_dropout", "drop_path_rate": "drop_path"}
_OTHERS = ("patch_nums", "share_quant_resi", "quant_resi", "drop_rate", "attn_drop_rate", "flash_if_available",
           "fused_if_available")                                    # translated below, the tokenizer's, or never used


def is_var(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a VAR transformer."""
    return "pos_1LC" in state and "class_emb.weight" in state


def transformer_from_var(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a VARTransformer. Unknown keys stay, so that the strict load names them."""
    return {key: tensor for key, tensor in state.items() if not key.endswith(_BUFFERS)}


def var_config_from_release(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for VARConfig from the original's arguments. Raises CheckpointError on unknown arguments."""
    unknown = sorted(set(config) - set(_RENAMED) - set(_OTHERS))
    if unknown:
        raise CheckpointError(f"unknown model arguments {', '.join(unknown)}; known are those of the VAR class")
    renamed = {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    return {**renamed, "scales": square_scales(config["patch_nums"])}


def infer_var_config(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Keyword arguments for VARConfig that the weights tell; `heads` is needed for other than 64 channels per head
    where attention is not normalised. Dropouts are those of the preset of this depth, if there is one.

    Raises CheckpointError when a tensor that shows a size is missing, or the scales cannot be read.
    """
    missing = [key for key in _SHAPES if key not in state]
    if missing:
        raise CheckpointError(f"transformer weights: {', '.join(missing)} missing, so the sizes cannot be read; "
                              "give a complete VAR file")
    dim, codebook_dim = state["word_embed.weight"].shape
    layers = 1 + max(int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key)))
    scale = state.get("blocks.0.attn.scale_mul_1H11")
    sizes = {
        "vocab_size": state["head.weight"].shape[0], "codebook_dim": codebook_dim, "dim": dim, "layers": layers,
        "heads": scale.shape[1] if scale is not None else heads or max(1, dim // _HEAD_DIM),
        "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / dim,
        "num_classes": state["class_emb.weight"].shape[0] - 1, "scales": square_scales(_sides(state)),
        "shared_adaln": "shared_ada_lin.1.weight" in state, "l2_attention": scale is not None,
    }
    preset = VAR_PRESETS.get(f"d{layers}")
    return {**sizes, **({} if preset is None else {"drop_path": preset.drop_path, "gamma_init": preset.gamma_init})}


def _sides(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Side of each scale: from the buffer that names the scale of each slot, or a preset of as many slots."""
    length, levels = state["pos_1LC"].shape[1], state["lvl_embed.weight"].shape[0]
    if "lvl_1L" in state:
        sizes = state["lvl_1L"].flatten().long().bincount(minlength=levels).tolist()
        sides = tuple(isqrt(size) for size in sizes)
        if len(sides) == levels and [side ** 2 for side in sides] == sizes:
            return sides
        raise CheckpointError(f"transformer weights: the slots of its scales, {sizes}, are not squares of one scale "
                              "each; give a VAR file")
    for preset in VAR_PRESETS.values():
        if (sum(side ** 2 for side in preset.sides), len(preset.sides)) == (length, levels):
            return preset.sides
    raise CheckpointError(f"transformer weights of {length} slots on {levels} scales without lvl_1L: no published "
                          "model has these, so its scales are unknown; give the original file")
