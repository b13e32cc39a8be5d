"""LlamaGen's VQ tokenizer files (VQ-16, VQ-8 and other widths) as ours. Keys agree but for the usage statistics."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from arimg.interop.convnet import convnet_sizes, is_ldm
from arimg.tokenizers.vq import VQConfig

_USAGE = "quantize.codebook_used"           # a FIFO of recent codes
_CODEBOOK = "quantize.embedding.weight"


def is_vq(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a VQ tokenizer."""
    return _CODEBOOK in state and not is_ldm(state)


def vq_from_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original keys to ours."""
    return {key: tensor for key, tensor in state.items() if key != _USAGE}


def infer_vq_config(state: Mapping[str, Tensor]) -> VQConfig:
    """The config that the shapes of an original state dict speak for; loss weights and l2 norm are LlamaGen's.

    Raises CheckpointError when a tensor that shows a size is missing.
    """
    sizes = convnet_sizes(state, (_CODEBOOK,))
    codebook_size, codebook_dim = state[_CODEBOOK].shape
    mirrored = sizes["decoder_multipliers"]
    return VQConfig(
        codebook_size=codebook_size, codebook_dim=codebook_dim,
        decoder_multipliers=None if mirrored == sizes["multipliers"] else mirrored,
        **{name: sizes[name] for name in ("base_channels", "multipliers", "res_blocks", "z_channels", "in_channels")})
