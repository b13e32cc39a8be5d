"""ControlAR's files and the encoders it starts from, as state dicts: dict in, dict out.

A ControlAR file is a LlamaGen transformer plus `adapter.model.*` (a Hugging Face ViT or DINOv2), `adapter_mlp.*`,
`condition_mlp.*` and `condition_layers.*`. Encoder keys are read in the naming of transformers 4 (`attention.query`,
`intermediate.dense`) and of transformers 5 (`q_proj`, `mlp.fc1`). A key that no rule knows keeps its name, so that the
strict load that follows names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arimg.control.adapter import ControlConfig
from arimg.errors import CheckpointError

State = Mapping[str, Tensor]

ENCODER = "adapter.model."
HEAD_DIM = 64           # of ViT-S (384 = 6 x 64), DINOv2-S and DINOv2-B (768 = 12 x 64)

# Loaded by the original but without effect on any output: a second token table, an unused norm, and the dropped
# control, which is zero.
DEAD_KEYS = ("condition_embeddings.weight", "condition_norm.weight", "condition_mlp.uncond_embedding")
DEAD_ENCODER_KEYS = re.compile(r"(pooler\.|classifier\.|embeddings\.mask_token$)")

FUSION_KEYS = re.compile(r"(adapter_mlp\.|condition_mlp\.|condition_layers\.)")
LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias|lambda1)$")
STEM = {
    "embeddings.cls_token": "vit.cls_token",
    "embeddings.position_embeddings": "vit.pos_embed",
    "embeddings.patch_embeddings.projection.weight": "vit.patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "vit.patch_embed.proj.bias",
    "layernorm.weight": "vit.norm.weight",
    "layernorm.bias": "vit.norm.bias",
}
PARTS = {
    "norm1": "norm1", "layernorm_before": "norm1", "norm2": "norm2", "layernorm_after": "norm2",
    "attention.attention.query": "attn.q", "attention.q_proj": "attn.q",
    "attention.attention.key": "attn.k", "attention.k_proj": "attn.k",
    "attention.attention.value": "attn.v", "attention.v_proj": "attn.v",
    "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1", "mlp.fc1": "mlp.fc1", "output.dense": "mlp.fc2", "mlp.fc2": "mlp.fc2",
    "layer_scale1": "ls1", "layer_scale2": "ls2",
}


class EncoderWeights(NamedTuple):
    """State dict of a ControlEncoder and the keys that were left out."""

    state: dict[str, Tensor]
    dropped: tuple[str, ...]


class ControlARWeights(NamedTuple):
    """State dict of a ControlAdapter, state dict of the transformer in LlamaGen's naming, keys that were left out."""

    control: dict[str, Tensor]
    transformer: dict[str, Tensor]
    dropped: tuple[str, ...]


def encoder_state(state: State) -> EncoderWeights:
    """A Hugging Face ViT or DINOv2 (bare, or inside a classifier) to ControlEncoder keys; q, k, v become one `qkv`."""
    result: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, tensor in state.items():
        name = re.sub(r"^(vit|dinov2)\.", "", key)
        if DEAD_ENCODER_KEYS.match(name):
            dropped.append(key)
        else:
            result[_encoder_key(name) or key] = tensor
    return EncoderWeights(_fuse_qkv(result), tuple(dropped))


def _encoder_key(name: str) -> str | None:
    if name in STEM:
        return STEM[name]
    match = LAYER.match(name)
    if match is None or match[2] not in PARTS:
        return None
    leaf = "gamma" if match[3] == "lambda1" else match[3]
    return f"vit.blocks.{match[1]}.{PARTS[match[2]]}.{leaf}"


def _fuse_qkv(state: State) -> dict[str, Tensor]:
    """Rows [q | k | v] where all three are present; a lone one keeps its key and fails the strict load by name."""
    result = dict(state)
    for key in state:
        parts = [key.replace(".attn.q.", f".attn.{name}.") for name in "qkv"]
        if ".attn.q." in key and all(part in state for part in parts):
            result[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.pop(part) for part in parts])
    return result


def split_controlar(state: State) -> ControlARWeights:
    """Part the state dict of a ControlAR model. Raises CheckpointError when it holds no control weights."""
    if "adapter_mlp.fc1.weight" not in state:
        raise CheckpointError("no ControlAR weights in this file (adapter_mlp.fc1.weight is missing); a plain LlamaGen "
                              "transformer is converted with --from llamagen")
    encoder = {key.removeprefix(ENCODER): tensor for key, tensor in state.items() if key.startswith(ENCODER)}
    mapped = encoder_state(encoder)
    control = {f"encoder.{key}": tensor for key, tensor in mapped.state.items()}
    dropped = [f"{ENCODER}{key}" for key in mapped.dropped]
    transformer = {}
    for key, tensor in state.items():
        if key in DEAD_KEYS:
            dropped.append(key)
        elif FUSION_KEYS.match(key):
            control[f"fusion.{key.replace('.cap_proj.', '.')}"] = tensor
        elif not key.startswith(ENCODER):
            transformer[key] = tensor
    return ControlARWeights(control, transformer, tuple(dropped))


def control_config_from_controlar(state: State, encoder_config: Mapping[str, Any] | None = None,
                                  types: tuple[str, ...] = ("canny",), stride: int = 16) -> ControlConfig:
    """Sizes of the control path read off the shapes of a ControlAR state dict.

    Not in the shapes: the number of attention heads and the epsilon of the layer norms. They are taken from
    `encoder_config` (`num_attention_heads`, `layer_norm_eps` of the encoder's config.json) or, without one, are width /
    64 and that of the published encoders. Raises CheckpointError on files whose shapes do not say enough.
    """
    encoder = {key: tensor for key, tensor in state.items() if key.startswith(ENCODER)}
    mapped = encoder_state({key.removeprefix(ENCODER): tensor for key, tensor in encoder.items()}).state
    sizes = encoder_sizes(mapped, encoder_config)
    return ControlConfig(**sizes, stride=stride, types=types, dim=_shape(state, "adapter_mlp.fc2.weight")[0],
                         points=len({key.split(".")[1] for key in state if key.startswith("condition_layers.")}))


def encoder_sizes(state: State, encoder_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """EncoderConfig fields read off the shapes of a ControlEncoder state dict (all but stride and types)."""
    width, _, patch, _ = _shape(state, "vit.patch_embed.proj.weight")
    positions = _shape(state, "vit.pos_embed")[1] - 1
    side = math.isqrt(positions)
    if side * side != positions:
        raise CheckpointError(f"the encoder's position table has {positions} rows beside the class token, which is no "
                              "square grid; only square tables are known")
    blocks = {key.split(".")[2] for key in state if key.startswith("vit.blocks.")}
    return {"kind": "dinov2" if "vit.blocks.0.ls1.gamma" in state else "vit", "embed_dim": width,
            "depth": len(blocks), "heads": _heads(width, encoder_config),
            "ffn_hidden": _shape(state, "vit.blocks.0.mlp.fc1.weight")[0], "patch": patch, "image_size": side * patch,
            "norm_eps": (encoder_config or {}).get("layer_norm_eps")}


def _heads(width: int, encoder_config: Mapping[str, Any] | None) -> int:
    if encoder_config is not None and "num_attention_heads" in encoder_config:
        return int(encoder_config["num_attention_heads"])
    if width % HEAD_DIM:
        raise CheckpointError(f"the encoder is {width} wide, no multiple of {HEAD_DIM}: its head count is unknown; "
                              "give the encoder's config.json with num_attention_heads")
    return width // HEAD_DIM


def _shape(state: State, key: str) -> torch.Size:
    if key not in state:
        raise CheckpointError(f"{key} is missing; the file holds no complete ControlAR control path")
    return state[key].shape
