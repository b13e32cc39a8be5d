from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from arimg.models.ar import ARConfig, ARTransformer
from arimg.presets import AR_PRESETS, KL_PRESETS, PUBLISHED, VAR_SIDES, VQ_PRESETS
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from arimg.tokenizers.vq import VQConfig, VQTokenizer

CLASS_MILLIONS = {"B": 110.89, "L": 342.91, "XL": 774.70, "XXL": 1410.97, "XXXL": 3893.03, "1B": 1199.62, "3B": 3096.66,
                  "7B": 6614.59}


def millions(module: torch.nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize("name", CLASS_MILLIONS)
def test_parameters_of_class_models(name: str) -> None:
    with torch.device("meta"):
        model = ARTransformer(ARConfig(**AR_PRESETS[name].config()))
    assert millions(model) == CLASS_MILLIONS[name]


def test_parameters_of_the_text_model() -> None:
    with torch.device("meta"):
        model = ARTransformer(ARConfig(**AR_PRESETS["XL"].config(conditioning="text", block_size=1024)))
    assert millions(model) == 777.68
    assert model.state_dict()["cls_embedding.uncond_embedding"].shape == (120, 2048)


@pytest.mark.parametrize("name, parameters", [("VQ-16", 71_883_403), ("VQ-8", 70_109_835)])
def test_parameters_of_tokenizers(name: str, parameters: int) -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig(**VQ_PRESETS[name].config()))
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters
    assert tokenizer.stride == VQ_PRESETS[name].stride


@pytest.mark.parametrize("name, parameters", [("KL-16", 66_456_019), ("KL-8", 83_653_863)])
def test_parameters_of_kl_autoencoders(name: str, parameters: int) -> None:
    with torch.device("meta"):
        tokenizer = KLTokenizer(KLConfig(**KL_PRESETS[name].config()))
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters
    assert (tokenizer.stride, tokenizer.token_channels) == (16, 16)


def test_parameters_of_the_multi_scale_tokenizer() -> None:
    with torch.device("meta"):
        tokenizer = MultiscaleTokenizer(MultiscaleConfig())
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 108_948_355
    for pixels, sides in VAR_SIDES.items():
        assert sides[-1] * tokenizer.stride == pixels
    assert [sum(side ** 2 for side in VAR_SIDES[pixels]) for pixels in (256, 512)] == [680, 2240]


def test_head_dims() -> None:
    assert {name: preset.dim // preset.heads for name, preset in AR_PRESETS.items()} == {
        "B": 64, "L": 64, "XL": 64, "XXL": 64, "XXXL": 64, "1B": 64, "3B": 100, "7B": 128}


def test_published_files_name_presets_and_square_tables() -> None:
    assert len({entry.file for entry in PUBLISHED}) == len(PUBLISHED)
    for entry in PUBLISHED:
        config = AR_PRESETS[entry.preset].config(conditioning=entry.conditioning, block_size=entry.block_size)
        assert ARConfig(**config).block_size == entry.block_size


def test_presets_import_no_torch() -> None:
    program = "import sys, arimg.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
