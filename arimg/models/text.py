"""Caption features from a T5 encoder (Raffel et al. 2020), as LlamaGen's text-conditional models read them."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arimg.errors import CheckpointError, MissingExtraError
from arimg.models.base import Condition

_MARKUP = re.compile(r"<[^>]*>|https?://\S+|www\.\S+")


class TextEncoder:
    """A transformers T5EncoderModel and its tokenizer (extra `text`)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(cls, model_folder: Path, tokenizer_folder: Path, dtype: torch.dtype,
                    device: torch.device) -> "TextEncoder":
        """Load both from local folders. Raises MissingExtraError without transformers, CheckpointError on a folder that
        it cannot read."""
        try:
            from transformers import AutoTokenizer, T5EncoderModel

            model: Any = T5EncoderModel.from_pretrained(model_folder, dtype=dtype, local_files_only=True,
                                                        use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        except ImportError as error:
            raise MissingExtraError("text", "transformers", "a prompt") from error
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{model_folder}: not a T5 encoder with a tokenizer beside it ({reason}); "
                                  "write both with save_pretrained") from error
        return cls(model.to(device).eval(), tokenizer)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], length: int) -> Condition:
        """Features (B, length, C), padding first and zero, with their mask; longer captions are cut."""
        device = self.model.device
        tokens = self.tokenizer([clean_caption(caption) for caption in captions], max_length=length, truncation=True,
                                padding="max_length", return_attention_mask=True, return_tensors="pt")
        mask_BP = tokens["attention_mask"].to(device)
        features_BPC = self.model(input_ids=tokens["input_ids"].to(device), attention_mask=mask_BP).last_hidden_state
        return left_padded(features_BPC, mask_BP.bool())


def clean_caption(caption: str) -> str:
    """Lower case, no markup, no addresses, single spaces: the part of LlamaGen's caption cleaning that prompts need."""
    return " ".join(_MARKUP.sub(" ", html.unescape(caption)).lower().split())


def left_padded(features_BPC: Tensor, mask_BP: Tensor) -> Condition:
    """Padding slots moved to the front, in order, and set to zero."""
    order_BP = mask_BP.long().argsort(dim=1, stable=True)
    mask_BP = mask_BP.gather(1, order_BP)
    features_BPC = features_BPC.gather(1, order_BP[..., None].expand_as(features_BPC))
    return Condition(caption_BPC=features_BPC * mask_BP[..., None], caption_mask_BP=mask_BP)
