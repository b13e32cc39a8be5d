"""A pipeline of several scales at toy size with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.models.var import VARConfig, VARTransformer
from arimg.pipeline import Pipeline
from arimg.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from tests.toy import CONTROL, SETTINGS

SCALES = ((1, 1), (2, 2), (4, 4))           # 16 x 16 pixels
LENGTH = 21
VAR = VARConfig(vocab_size=32, codebook_dim=6, scales=SCALES, dim=48, layers=3, heads=4, num_classes=3,
                inject_layers=(0, 1, 2))


TOKENIZER = MultiscaleConfig(codebook_size=32, codebook_dim=6, base_channels=32, multipliers=(1, 1, 1), res_blocks=1,
                             scales=SCALES, phis=2)


def toy_tokenizer() -> MultiscaleTokenizer:
    """Codes far enough apart that every one matters."""
    tokenizer = MultiscaleTokenizer(TOKENIZER)
    nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer.eval()


def toy_scales_pipeline(dtype: torch.dtype = torch.float32, control: ControlConfig | None = CONTROL,
                        **var: Any) -> Pipeline:
    """Random weights, the same in every call; large enough that classes, codes and controls change the laws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, transformer = toy_tokenizer(), VARTransformer(replace(VAR, **var))
        adapter = None if control is None else ControlAdapter(control)
        for network in (transformer, adapter):
            for name, tensor in network.named_parameters() if network is not None else ():
                if tensor.ndim > 1:
                    wide = any(part in name for part in ("_emb", "pos_"))
                    nn.init.normal_(tensor, std=1.0 if wide else 0.02 if "head_nm" in name else 0.2)
    settings = replace(SETTINGS, decoder="scale", control_types=() if adapter is None else adapter.config.types)
    pipe = Pipeline(tokenizer, transformer.eval(), None if adapter is None else adapter.eval(), None, settings)
    return pipe.to(dtype)
