from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arimg.errors import CheckpointError, MissingExtraError
from arimg.models.text import TextEncoder, clean_caption, left_padded


@pytest.mark.parametrize("caption, expected", [
    ("  A  Red\tBus ", "a red bus"),
    ("a <b>bold</b> cat", "a bold cat"),
    ("see https://example.com/x?y=1 now", "see now"),
    ("www.example.com", ""),
    ("salt &amp; pepper", "salt & pepper"),
])
def test_clean_caption(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected


def test_padding_moves_to_the_front_in_order() -> None:
    features = torch.arange(1.0, 9.0).view(2, 4, 1)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    condition = left_padded(features, mask)
    assert condition.caption_BPC is not None and condition.caption_mask_BP is not None
    assert condition.caption_BPC[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]]
    assert condition.caption_mask_BP.tolist() == [[False, False, True, True], [True] * 4]


class Letters:
    """A tokenizer of letters: a = 1, b = 2 ..., 0 pads on the right."""

    def __call__(self, captions: list[str], max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        assert options == {"truncation": True, "padding": "max_length", "return_attention_mask": True,
                           "return_tensors": "pt"}
        ids = torch.tensor([([ord(letter) - 96 for letter in caption] + [0] * max_length)[:max_length]
                            for caption in captions])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Doubler:
    """An encoder whose one feature is twice the id, plus one on padding."""

    device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=(2.0 * input_ids + 1 - attention_mask)[..., None])


def test_captions_become_left_padded_features() -> None:
    condition = TextEncoder(Doubler(), Letters())(["AB", "abcdef"], 4)
    assert condition.caption_BPC is not None and condition.caption_mask_BP is not None
    assert condition.caption_BPC[..., 0].tolist() == [[0, 0, 2, 4], [2, 4, 6, 8]]     # the second is cut
    assert condition.caption_mask_BP.tolist() == [[False, False, True, True], [True] * 4]


def load(folder: Path) -> TextEncoder:
    return TextEncoder.from_folder(folder / "text_encoder", folder / "text_tokenizer", torch.float32,
                                   torch.device("cpu"))


def test_without_transformers_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"a prompt needs transformers.*arimg\[text\]"):
        load(tmp_path)


def test_folder_without_t5(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="not a T5 encoder"):
        load(tmp_path)
