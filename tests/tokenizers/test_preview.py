"""The picture of one pixel per token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arimg.checkpoints import find_model, load_component
from arimg.errors import InputError
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.tokenizers.preview import Preview


@torch.no_grad()
def test_colours_of_the_embedded_tokenizer() -> None:
    """Blocks of equal codes show the mean colour that the decoder paints; the map was fitted to other ones."""
    tokenizer = load_component(find_model("emoji") / "tokenizer", torch.float32, torch.device("cpu"))
    preview = Preview.of(tokenizer)
    generator = torch.Generator().manual_seed(9)
    blocks_Bhw = torch.randint(tokenizer.vocab_size, (2, 4, 4), generator=generator)
    codes_BL = blocks_Bhw.repeat_interleave(3, 1).repeat_interleave(3, 2).flatten(1)
    painted_B3hw = F.avg_pool2d(tokenizer.decode_codes(codes_BL, (12, 12)).clamp(-1, 1), tokenizer.stride)
    shown_B3hw = preview(codes_BL, (12, 12))
    assert shown_B3hw.shape == painted_B3hw.shape and float(shown_B3hw.abs().max()) <= 1
    unexplained = (shown_B3hw - painted_B3hw).square().mean() / painted_B3hw.var(dim=(0, 2, 3)).mean()
    assert float(unexplained) < 0.35
    assert torch.equal(Preview.of(tokenizer).table_V3, preview.table_V3), "nothing in it is left to chance"


def test_continuous_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="preview: this tokenizer has no raster of codes"):
        Preview.of(KLTokenizer(KLConfig(base_channels=32, multipliers=(1, 1), attention_levels=(), latent_channels=4)))
