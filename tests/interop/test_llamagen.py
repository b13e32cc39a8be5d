from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.errors import CheckpointError
from arimg.interop.llamagen import (ar_config_from_llamagen, ffn_hidden, guidance_interval, infer_ar_config,
                                    is_transformer, transformer_from_llamagen)
from arimg.models.ar import ARConfig, ARTransformer
from arimg.presets import AR_PRESETS
from tests.models.toy import toy_model


def meta_state(**config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(ARTransformer(ARConfig(**config)).state_dict())


@pytest.mark.parametrize("name", ["B", "3B"])
def test_presets_are_recognised_from_shapes(name: str) -> None:
    preset = AR_PRESETS[name]
    assert infer_ar_config(meta_state(**preset.config(num_classes=10))) == {
        **preset.config(), "kv_heads": None, "vocab_size": 16384, "conditioning": "class", "num_classes": 10}


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_keys_are_recognised(kv_heads: int) -> None:
    assert infer_ar_config(toy_model(kv_heads=kv_heads).state_dict(), heads=4)["kv_heads"] == kv_heads


def test_captions_are_recognised() -> None:
    inferred = infer_ar_config(toy_model(conditioning="text").state_dict(), heads=4)
    assert (inferred["conditioning"], inferred["caption_length"], inferred["caption_dim"]) == ("text", 7, 12)


def test_heads_of_unknown_sizes_must_be_given() -> None:
    with pytest.raises(CheckpointError, match="width 32 with 3 layers are no published size.*--heads"):
        infer_ar_config(toy_model().state_dict())


@pytest.mark.parametrize("key", ["tok_embeddings.weight", "layers.0.attention.wqkv.weight",
                                 "cls_embedding.embedding_table.weight"])
def test_missing_shapes_are_named(key: str) -> None:
    state = toy_model().state_dict()
    del state[key]
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        infer_ar_config(state, heads=4)


def test_control_weights_and_the_stray_table_are_left_out() -> None:
    state = toy_model().state_dict()
    more = ["freqs_cis", "adapter.model.layernorm.weight", "adapter_mlp.fc1.weight",
            "condition_mlp.cap_proj.fc1.weight", "condition_layers.0.fc1.weight", "condition_embeddings.weight",
            "condition_norm.weight"]
    taken = transformer_from_llamagen({**state, **{key: torch.zeros(1) for key in more}, "unknown": torch.zeros(1)})
    assert taken.keys() == state.keys() | {"unknown"}
    assert is_transformer(taken) and not is_transformer({"quantize.embedding.weight": torch.zeros(1)})


def test_model_arguments() -> None:
    arguments = {"dim": 64, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "multiple_of": 32, "caption_dim": 40,
                 "vocab_size": 96, "cls_token_num": 77, "block_size": 16, "model_type": "t2i", "token_dropout_p": 0.3,
                 "attn_dropout_p": 0.0, "resid_dropout_p": 0.2, "ffn_dropout_p": 0.1, "class_dropout_prob": 0.4,
                 "rope_base": 500, "norm_eps": 1e-6, "max_seq_len": 2048}
    config = ARConfig(**ar_config_from_llamagen(arguments))
    assert config == ARConfig(
        vocab_size=96, dim=64, layers=3, heads=4, kv_heads=2, ffn_hidden=192, block_size=16, conditioning="text",
        class_dropout=0.4, caption_dim=40, caption_length=77, rope_base=500, norm_eps=1e-6, token_dropout=0.3,
        residual_dropout=0.2, ffn_dropout=0.1)


@pytest.mark.parametrize("dim, multiple_of, multiplier, hidden", [
    (768, 256, None, 2048), (1024, 256, None, 2816), (3200, 256, None, 8704), (64, 32, None, 192), (64, 32, 1.3, 224)])
def test_ffn_hidden(dim: int, multiple_of: int, multiplier: float | None, hidden: int) -> None:
    assert ffn_hidden(dim, multiple_of, multiplier) == hidden


def test_unknown_arguments_are_named() -> None:
    with pytest.raises(CheckpointError, match="unknown model arguments heads, layers"):
        ar_config_from_llamagen({"layers": 3, "heads": 4})
    with pytest.raises(CheckpointError, match="model_type 'i2t': LlamaGen has c2i and t2i"):
        ar_config_from_llamagen({"model_type": "i2t"})


def test_guidance_interval() -> None:
    assert guidance_interval(-1) == (0, None)
    assert guidance_interval(4) == (0, 6)           # the prefix pass and decode steps 0 .. 4
