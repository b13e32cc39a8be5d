"""VAR's multi-scale tokenizer (`vae_ch160v4096z32.pth`) as ours: dict in, dict out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from arimg.errors import CheckpointError
from arimg.interop.convnet import convnet_from_ldm, convnet_sizes, count, is_ldm
from arimg.presets import square_scales
from arimg.tokenizers.multiscale import MultiscaleConfig, Scales

_USAGE = "ema_vocab_hit_SV"                 # how often each code was hit; the release tolerates any first size
_CODEBOOK = "quantize.embedding.weight"
_PHI = re.compile(r"quant_resi\.(?:qresi_ls\.)?(\d+)\.")
_RENAMED = {"V": "codebook_size", "Cvae": "codebook_dim", "ch": "base_channels", "ch_mult": "multipliers",
            "num_res_blocks": "res_blocks", "quant_conv_ks": "conv_kernel", "quant_resi": "residual_ratio",
            "share_quant_resi": "phis", "using_znorm": "z_norm", "beta": "commit_beta"}


def is_var_vae(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of VAR's tokenizer."""
    return _CODEBOOK in state and is_ldm(state)


def multiscale_from_var(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original keys of the tokenizer, or of its quantiser alone (then without a prefix too), to ours.

    The three spellings of the phis, one (`qresi`), some (`qresi_ls.{i}`), one per scale (`{i}`), become `phis.{i}`.
    """
    renamed = {}
    for key, tensor in state.items():
        if not key.endswith(_USAGE):
            renamed[_PHI.sub(r"phis.\1.", key.replace("quant_resi.qresi.", "phis.0."))] = tensor
    return convnet_from_ldm(renamed)


def multiscale_config_from_var(config: Mapping[str, Any]) -> MultiscaleConfig:
    """The config of the original's arguments; others than the tokenizer's are left out."""
    known = {ours: config[theirs] for theirs, ours in _RENAMED.items() if theirs in config}
    if "multipliers" in known:
        known["multipliers"] = tuple(known["multipliers"])
    return MultiscaleConfig(**known, scales=square_scales(config["patch_nums"]))


def infer_multiscale_config(state: Mapping[str, Tensor], scales: Scales | None = None) -> MultiscaleConfig:
    """The config that the shapes of an original state dict speak for, on the scales of its transformer (None = those of
    256 pixels). Not in the shapes: the ratio and the lookup, which are the release's.

    Raises CheckpointError when a tensor that shows a size is missing, or there are not as many phis as scales.
    """
    ours = multiscale_from_var(state)
    sizes = convnet_sizes(ours, (_CODEBOOK,))
    codebook_size, codebook_dim = state[_CODEBOOK].shape
    phis = count(ours, r"quantize\.phis\.(\d+)\.")
    own_phis = "quantize.quant_resi.0.weight" in state
    known: dict[str, Any] = {} if scales is None else {"scales": scales}
    known |= {} if phis else {"residual_ratio": 0.0}
    config = MultiscaleConfig(
        codebook_size=codebook_size, codebook_dim=codebook_dim, phis=0 if own_phis else phis,
        conv_kernel=state["quant_conv.weight"].shape[-1], **known,
        **{name: sizes[name] for name in ("base_channels", "multipliers", "res_blocks", "in_channels")})
    if config.phi_count != phis:
        raise CheckpointError(f"tokenizer weights: {phis} phis, one per scale, for {len(config.scales)} scales; give "
                              "the transformer that the tokenizer belongs to")
    return config
