"""Pipelines of continuous tokens at toy size, with random weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.pipeline import Pipeline
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from tests.models.toy_continuous import toy_causal, toy_mar
from tests.toy import SETTINGS, STRIDE

KL = KLConfig(base_channels=32, multipliers=(1, 1), res_blocks=1, latent_channels=1, attention_levels=(1,),
              patch_size=2)
PLAIN = {"masked": "masked", "causal": "ar-continuous"}


def toy_continuous_pipeline(model: str, control: ControlConfig | None = None) -> Pipeline:
    """`model`: masked or causal; 4 x 4 tokens of four numbers, stride 4, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = KLTokenizer(KL)
        adapter = None if control is None else ControlAdapter(replace(control, dim=32, patch=STRIDE, stride=STRIDE))
        if adapter is not None:
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    network = toy_mar() if model == "masked" else toy_causal()
    types = () if adapter is None else adapter.config.types
    settings = replace(SETTINGS, control_types=types, decoder=PLAIN[model])
    pipe = Pipeline(tokenizer.eval(), network, None if adapter is None else adapter.eval(), None, settings)
    return pipe.to(torch.float64)
