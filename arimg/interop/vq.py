"""LlamaGen's VQ tokenizer files (VQ-16, VQ-8 and other widths) as ours. Keys agree but for the usage statistics."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from arimg.errors import CheckpointError
from arimg.tokenizers.vq import VQConfig

_USAGE = "quantize.codebook_used"           # a FIFO of recent codes
_SHAPES = ("quantize.embedding.weight", "encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight")


def is_vq(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a VQ tokenizer."""
    return "quantize.embedding.weight" in state


def vq_from_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original keys to ours."""
    return {key: tensor for key, tensor in state.items() if key != _USAGE}


def infer_vq_config(state: Mapping[str, Tensor]) -> VQConfig:
    """The config that the shapes of an original state dict speak for; loss weights and l2 norm are LlamaGen's.

    Raises CheckpointError when a tensor that shows a size is missing.
    """
    absent = [key for key in _SHAPES if key not in state or state[key].ndim < 2]
    levels = _count(state, r"encoder\.conv_blocks\.(\d+)\.")
    res_blocks = _count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\.")
    encoder, decoder = ([f"{part}.conv_blocks.{level}.res.0.conv1.weight" for level in range(levels)]
                        for part in ("encoder", "decoder"))
    absent += [key for key in (*encoder, *decoder) if key not in state]
    if absent or not levels:
        raise CheckpointError(f"tokenizer weights: {', '.join(absent or ['encoder.conv_blocks'])} missing or without "
                              "shape, so the sizes cannot be read; give a complete LlamaGen VQ file")
    base = state["encoder.conv_in.weight"].shape[0]
    codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
    multipliers = tuple(state[key].shape[0] // base for key in encoder)
    mirrored = tuple(state[key].shape[0] // base for key in reversed(decoder))
    return VQConfig(
        codebook_size=codebook_size, codebook_dim=codebook_dim, base_channels=base, multipliers=multipliers,
        decoder_multipliers=None if mirrored == multipliers else mirrored, res_blocks=res_blocks,
        z_channels=state["encoder.conv_out.weight"].shape[0], in_channels=state["encoder.conv_in.weight"].shape[1])


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that `pattern` finds in the keys; 0 if none."""
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1
