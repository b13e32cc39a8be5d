"""Convolutional encoders and decoders in latent diffusion's layout (Rombach et al. 2022), which VAR's and MAR's
tokenizers keep, as ours: dict in, dict out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from arimg.errors import CheckpointError

State = Mapping[str, Tensor]

_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)\.(\d+)\.(.+)")
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_SHAPES = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight")


def is_ldm(state: State) -> bool:
    """Whether these are the keys of such an autoencoder."""
    return "encoder.down.0.block.0.conv1.weight" in state


def convnet_from_ldm(state: State) -> dict[str, Tensor]:
    """Original keys to ours. Unknown keys stay, so that the strict load names them.

    Levels are numbered from the full resolution there, in the order of computation here; fused queries, keys and values
    (VAR) are parted.
    """
    levels = count(state, r"decoder\.up\.(\d+)\.")
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _renamed(key, levels)
        if ".qkv." in name:
            result.update({name.replace(".qkv.", f".{part}."): rows for part, rows in zip("qkv", tensor.chunk(3))})
        else:
            result[name] = tensor
    return result


def _renamed(key: str, levels: int) -> str:
    for theirs, ours in _MIDDLE.items():
        key = re.sub(rf"^(encoder|decoder)\.mid\.{theirs}\.", rf"\1.mid.{ours}.", key)
    match = _LEVEL.fullmatch(key)
    if match is None:
        return key
    level = int(match[2]) if match[1] == "encoder" else levels - 1 - int(match[2])
    return f"{match[1]}.conv_blocks.{level}.{re.sub('^block.', 'res.', match[3])}"


def convnet_sizes(state: State, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """base_channels, multipliers, decoder_multipliers, res_blocks, in_channels, z_channels, attention_levels and
    decoder_attention_levels that the shapes in our layout speak for.

    Raises CheckpointError when a tensor that shows a size is missing, one of `others` included.
    """
    levels = count(state, r"encoder\.conv_blocks\.(\d+)\.")
    encoder, decoder = ([f"{part}.conv_blocks.{level}.res.0.conv1.weight" for level in range(levels)]
                        for part in ("encoder", "decoder"))
    absent = [key for key in (*others, *_SHAPES, *encoder, *decoder) if key not in state or state[key].ndim < 2]
    if absent or not levels:
        raise CheckpointError(f"tokenizer weights: {', '.join(absent or ['encoder.conv_blocks'])} missing or without "
                              "shape, so the sizes cannot be read; give a complete tokenizer file")
    base = state["encoder.conv_in.weight"].shape[0]
    attended = {part: tuple(level for level in range(levels) if f"{part}.conv_blocks.{level}.attn.0.q.weight" in state)
                for part in ("encoder", "decoder")}
    return {
        "base_channels": base, "multipliers": tuple(state[key].shape[0] // base for key in encoder),
        "decoder_multipliers": tuple(state[key].shape[0] // base for key in reversed(decoder)),
        "res_blocks": count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "z_channels": state["encoder.conv_out.weight"].shape[0], "attention_levels": attended["encoder"],
        "decoder_attention_levels": tuple(sorted(levels - 1 - level for level in attended["decoder"]))}


def count(state: State, pattern: str) -> int:
    """One more than the highest number that `pattern` finds in the keys; 0 if none."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)
