"""A pipeline of toy size with random weights, in memory or as a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arimg.checkpoints import PipelineSettings
from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.text import TextEncoder
from arimg.pipeline import Pipeline
from arimg.tokenizers.vq import VQConfig, VQTokenizer

STRIDE = 4
SIDE = 16                                   # pixels; 4x4 tokens
CLASSES = ("cat", "dog", "goldfish, Carassius auratus")

VQ = VQConfig(codebook_size=64, codebook_dim=4, base_channels=32, multipliers=(1, 1, 1), res_blocks=1, z_channels=32)
AR = ARConfig(vocab_size=64, dim=48, layers=3, heads=4, ffn_hidden=64, block_size=64, num_classes=len(CLASSES),
              caption_dim=12, caption_length=6, rope_prefix="identity", rope_grid="true", inject_layers=(0, 1, 2))
CONTROL = ControlConfig(kind="small", embed_dim=16, depth=1, heads=2, ffn_hidden=32, patch=STRIDE, stride=STRIDE,
                        types=("canny",), dim=48, points=3)
WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog", "red", "on", "grass")
SETTINGS = PipelineSettings(title="toy", class_names=CLASSES, control_types=("canny",), size=(SIDE, SIDE), cfg=2.0)


def toy_pipeline(dtype: torch.dtype = torch.float32, control: ControlConfig | None = CONTROL, text: Any = None,
                 levels: int = 3, **ar: Any) -> Pipeline:
    """Random weights, the same in every call; large enough that classes, codes and controls change the laws.

    `levels` of the tokenizer make a stride of 2 ** (levels - 1) pixels; `ar` are fields of ARConfig.
    """
    config, stride = replace(AR, **ar), 2 ** (levels - 1)
    control = control and replace(control, patch=stride, stride=stride)
    settings = SETTINGS
    if config.conditioning == "text":
        settings = replace(settings, class_names=())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, transformer = VQTokenizer(replace(VQ, multipliers=(1,) * levels)), ARTransformer(config)
        adapter = None if control is None else ControlAdapter(control)
        networks = [part for part in (transformer, adapter) if part is not None]
        for name, tensor in [named for network in networks for named in network.named_parameters()]:
            if tensor.ndim > 1:
                torch.nn.init.normal_(tensor, std=1.0 if "embedding" in name else 0.2)
        if config.codebook_dim is not None:
            transformer.codebook.normal_()
    if adapter is not None:
        settings = replace(settings, control_types=adapter.config.types)
    else:
        settings = replace(settings, control_types=())
    pipe = Pipeline(tokenizer.eval(), transformer.eval(), None if adapter is None else adapter.eval(), text, settings)
    return pipe.to(dtype)


def toy_text_encoder(width: int) -> TextEncoder:
    """A T5 encoder with random weights and a tokenizer of nine words; needs transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2,
                      feed_forward_proj="gated-gelu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5EncoderModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return TextEncoder(model.eval(), tokenizer)


def toy_folder(folder: Path, **options: Any) -> Path:
    """The same, written as a pipeline folder."""
    return toy_pipeline(**options).save_pretrained(folder)
