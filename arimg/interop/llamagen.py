"""LlamaGen's transformer (GPT) files and constructor arguments as ours; state-dict keys agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from arimg.errors import CheckpointError
from arimg.presets import AR_PRESETS

_CONTROL = re.compile(r"(adapter|adapter_mlp|condition_\w+)\.")     # ControlAR's additions: see interop/controlar.py
_STRAY = "freqs_cis"                                                # the rotary table, in some released files
_CONDITIONING = {"c2i": "class", "t2i": "text"}
_RENAMED = {
    "dim": "dim", "n_layer": "layers", "n_head": "heads", "n_kv_head": "kv_heads", "rope_base": "rope_base",
    "norm_eps": "norm_eps", "token_dropout_p": "token_dropout", "resid_dropout_p": "residual_dropout",
    "ffn_dropout_p": "ffn_dropout", "num_classes": "num_classes", "caption_dim": "caption_dim",
    "class_dropout_prob": "class_dropout", "vocab_size": "vocab_size", "block_size": "block_size",
}
_TRANSLATED = ("multiple_of", "ffn_dim_multiplier", "model_type", "cls_token_num")
_WITHOUT_EFFECT = ("attn_dropout_p", "drop_path_rate", "initializer_range",             # training only
                   "max_batch_size", "max_seq_len",                                     # its cache
                   "condition_token_num", "image_size", "adapter_size", "condition_type")   # ControlAR's encoder


def is_transformer(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a LlamaGen or ControlAR transformer."""
    return "tok_embeddings.weight" in state


def transformer_from_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's part of a file, without control weights and the stray rotary table. Unknown keys stay, so
    that the strict load names them."""
    return {key: tensor for key, tensor in state.items() if key != _STRAY and not _CONTROL.match(key)}


def ar_config_from_llamagen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ARConfig from the original's ModelArgs. Raises CheckpointError on unknown arguments."""
    unknown = sorted(set(config) - set(_RENAMED) - set(_TRANSLATED) - set(_WITHOUT_EFFECT))
    if unknown:
        raise CheckpointError(f"unknown model arguments {', '.join(unknown)}; known are those of LlamaGen's ModelArgs")
    result = {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    model_type = config.get("model_type", "c2i")
    if model_type not in _CONDITIONING:
        raise CheckpointError(f"model_type {model_type!r}: LlamaGen has {' and '.join(_CONDITIONING)}")
    result["conditioning"] = _CONDITIONING[model_type]
    if model_type == "t2i":
        result["caption_length"] = config.get("cls_token_num", 120)
    dim = config.get("dim", 4096)
    result["dim"] = dim
    result["ffn_hidden"] = ffn_hidden(dim, config.get("multiple_of", 256), config.get("ffn_dim_multiplier"))
    return result


def ffn_hidden(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """int(8/3 * dim), times the optional multiplier, rounded up to a multiple (spec of the LlamaGen block)."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def infer_ar_config(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """Keyword arguments for ARConfig that the shapes speak for.

    `heads` is needed for sizes without a preset. Not in the weights, so not in the result: block_size, rope_base, the
    dropouts. A class table is taken to end with the null class. Raises CheckpointError when a tensor that shows a size
    is missing or the heads are unknown.
    """
    names = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight")
    missing = [name for name in names if name not in state or state[name].ndim != 2]
    if missing:
        raise CheckpointError(f"transformer weights: {', '.join(missing)} missing or not a matrix, so the sizes cannot "
                              "be read; give a complete LlamaGen file")
    vocab_size, dim = state["tok_embeddings.weight"].shape
    layers = 1 + max(int(match[1]) for key in state if (match := re.match(r"layers\.(\d+)\.", key)))
    heads = heads or _preset_heads(dim, layers)
    head_dim = dim // heads
    kv_heads = (state["layers.0.attention.wqkv.weight"].shape[0] - dim) // (2 * head_dim)
    result = {"vocab_size": vocab_size, "dim": dim, "layers": layers, "heads": heads,
              "kv_heads": None if kv_heads == heads else kv_heads,
              "ffn_hidden": state["layers.0.feed_forward.w1.weight"].shape[0]}
    return {**result, **_infer_conditioning(state)}


def _preset_heads(dim: int, layers: int) -> int:
    for preset in AR_PRESETS.values():
        if (preset.dim, preset.layers) == (dim, layers):
            return preset.heads
    raise CheckpointError(f"transformer weights of width {dim} with {layers} layers are no published size, and weights "
                          "do not tell the number of heads; give it with --heads")


def _infer_conditioning(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if "cls_embedding.embedding_table.weight" in state:
        return {"conditioning": "class", "num_classes": state["cls_embedding.embedding_table.weight"].shape[0] - 1}
    if "cls_embedding.uncond_embedding" in state:
        length, caption_dim = state["cls_embedding.uncond_embedding"].shape
        return {"conditioning": "text", "caption_length": length, "caption_dim": caption_dim}
    raise CheckpointError("transformer weights: neither cls_embedding.embedding_table.weight nor "
                          "cls_embedding.uncond_embedding is there; give a class- or text-conditional LlamaGen file")


def guidance_interval(cfg_interval: int) -> tuple[int, int | None]:
    """LlamaGen's cfg_interval k as token positions: the prefix pass and decode steps 0 .. k are guided; -1 = all."""
    return (0, None) if cfg_interval < 0 else (0, cfg_interval + 2)
