"""The judge of styles on a data set whose styles are colours, and a tokenizer that turns the picture upside down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from arimg.data import EmojiSet
from arimg.errors import InputError
from arimg.evals.extractors import Features
from arimg.evals.styles import StyleJudge, style_of
from arimg.tokenizers.base import Encoded

CLASSES = ("blue/x", "blue/y", "red/x", "red/y")


class Mean:
    """The mean colour of the upper and of the lower half."""

    name, layer = "mean", "halves"

    def __call__(self, pixels_BHW3: np.ndarray) -> Features:
        halves = (pixels_BHW3[:, :4], pixels_BHW3[:, 4:])
        return Features(np.concatenate([half.mean((1, 2)) for half in halves], 1).astype(np.float32))

    def describe(self) -> dict[str, str]:
        return {"name": self.name}


class UpsideDown(torch.nn.Module):
    stride, vocab_size = 4, 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images_B3HW: Tensor) -> Encoded:
        self.images = images_B3HW
        return Encoded(torch.zeros(len(images_B3HW), 4, dtype=torch.int64), images_B3HW, (2, 2))

    def decode_codes(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.images.flip(2)


def colours(class_names: tuple[str, ...] = CLASSES) -> EmojiSet:
    """In the upper half of each picture the colour of its style; every fourth is held out."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % len(class_names)
    pixels = rng.integers(100, 156, (64, 8, 8, 3), dtype=np.uint8)
    for picture, label in zip(pixels, labels):
        picture[:4, :, 2 if style_of(class_names[label]) == "blue" else 0] += 60
    return EmojiSet(pixels, labels, np.arange(64) // 4 % 4 == 3, [""] * 64, class_names, "")


def test_the_plain_probe_does_not_know_the_traces_of_a_tokenizer() -> None:
    emoji = colours()
    judge = StyleJudge(emoji, UpsideDown(), Mean())
    held_out = emoji.images[emoji.held_out]
    names = [CLASSES[label] for label in emoji.labels[emoji.held_out]]
    originals, rebuilt = judge.right(held_out, names, "originals"), judge.right(held_out[:, ::-1], names, "rebuilt")
    assert originals["style_accuracy"].all() and originals["style_accuracy_plain"].all()
    assert rebuilt["style_accuracy"].all() and not rebuilt["style_accuracy_plain"].all()
    swapped = judge.right(held_out, [judge.other_style(name) for name in names], "swapped")
    assert not swapped["style_accuracy"].any()


def test_other_style_keeps_the_group() -> None:
    judge = StyleJudge(colours(), UpsideDown(), Mean())
    assert [judge.other_style(name) for name in CLASSES] == ["red/x", "red/y", "blue/x", "blue/y"]


@pytest.mark.parametrize("class_names", [("cat", "dog"), ("blue/x", "blue/y"), ("blue/x", "red/y")])
def test_classes_without_styles_are_refused(class_names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="several styles with the same groups"):
        StyleJudge(colours(class_names), UpsideDown(), Mean())
