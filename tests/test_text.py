"""Captions from end to end, with a T5 folder of toy size built here (acceptance A4)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from arimg import Pipeline
from arimg.cli import main
from arimg.errors import CheckpointError, InputError, MissingExtraError
from arimg.models.text import clean_caption, left_padded
from tests.toy import AR, SIDE, toy_pipeline, toy_text_encoder

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra `text`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = toy_pipeline(conditioning="text", text=toy_text_encoder(AR.caption_dim))
    return pipe.save_pretrained(tmp_path_factory.mktemp("text") / "toy")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, dtype="float64")


def test_left_padding() -> None:
    features_BPC = torch.arange(1.0, 9.0).view(2, 4, 1)
    condition = left_padded(features_BPC, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool())
    assert condition.caption_BPC is not None and condition.caption_mask_BP is not None
    assert condition.caption_BPC[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]]
    assert condition.caption_mask_BP.tolist() == [[False, False, True, True], [True] * 4]


def test_clean_caption() -> None:
    assert clean_caption("  A <b>Red</b> cat &amp; dog\n https://a.b/c?d  ") == "a red cat & dog"


@needs_transformers
def test_features_are_those_of_the_encoder_rotated_and_masked(pipe: Pipeline) -> None:
    assert pipe.text is not None
    condition = pipe.text(["A  cat", "a red dog on grass and more"], AR.caption_length)
    assert condition.caption_mask_BP.tolist() == [[False] * 3 + [True] * 3, [True] * 6]
    with torch.no_grad():
        alone = pipe.text.model(input_ids=torch.tensor([[3, 4, 1]])).last_hidden_state
    assert torch.allclose(condition.caption_BPC[0, 3:], alone[0]) and not condition.caption_BPC[0, :3].any()
    assert pipe.text.model.dtype == torch.float64


@needs_transformers
def test_prompt_changes_the_picture_and_padding_does_not(pipe: Pipeline) -> None:
    cat, dog = pipe(prompt="a cat"), pipe(prompt="a red dog on grass")
    assert not torch.equal(cat.codes, dog.codes)
    both = pipe(prompt=["a cat", "a red dog on grass"], seeds=[0, 0])
    assert torch.equal(both.codes, torch.cat([cat.codes, dog.codes]))


@needs_transformers
def test_given_features_are_the_prompt(pipe: Pipeline) -> None:
    condition = pipe.text(["a cat"], AR.caption_length)
    expected = pipe(prompt="a cat", n=2).codes
    given = pipe(prompt_embeds=condition.caption_BPC, prompt_attention_mask=condition.caption_mask_BP, n=2)
    assert torch.equal(given.codes, expected)
    noisy = condition.caption_BPC + ~condition.caption_mask_BP[..., None]       # what lies in padding does not matter
    again = pipe(prompt_embeds=noisy[0], prompt_attention_mask=condition.caption_mask_BP[0], n=2)
    assert torch.equal(again.codes, expected)


@needs_transformers
def test_no_prompt_is_the_null_caption(pipe: Pipeline) -> None:
    null_PC = pipe.transformer.cls_embedding.uncond_embedding
    assert torch.equal(pipe(n=2).codes, pipe(prompt_embeds=null_PC, n=2, cfg=1.0).codes)


@needs_transformers
def test_caption_and_control(pipe: Pipeline) -> None:
    control = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    with_control, without = pipe(control, prompt="a cat"), pipe(prompt="a cat")
    assert not torch.equal(with_control.codes, without.codes)
    assert torch.equal(pipe(control, prompt="a cat", control_scale=0.0).codes, without.codes)


@needs_transformers
@pytest.mark.parametrize(("options", "message"), [
    ({"class_id": 0}, "a class is given, but this model knows captions"),
    ({"prompt": []}, "list of classes or prompts is empty"),
    ({"prompt_embeds": torch.zeros(5, 12)}, "this model reads \\(6, 12\\)"),
    ({"prompt_embeds": torch.zeros(6, 12), "prompt_attention_mask": torch.ones(5)}, "it needs one value per slot"),
])
def test_captions_that_cannot_be(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**options)


def sample(folder: Path, out: Path) -> list[str]:
    return ["sample", "--model", str(folder), "--prompt", "a cat", "-o", str(out)]


@needs_transformers
def test_command_line(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, sample(folder, tmp_path / "a.png"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'a.png'}\n"
    again = CliRunner().invoke(main, ["sample", "--from", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")])
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@needs_transformers
def test_without_the_extra_one_line_names_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="a prompt needs transformers, .*pip install 'arimg\\[text\\]'"):
        Pipeline.from_pretrained(folder)
    result = CliRunner().invoke(main, sample(folder, tmp_path / "a.png"))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "arimg[text]" in result.stderr
    features = Pipeline.from_pretrained(folder, text=False)
    assert features(prompt_embeds=torch.ones(6, 12)).codes.shape == (1, 16)
    with pytest.raises(InputError, match="no text encoder; add the folders text_encoder and text_tokenizer"):
        features(prompt="a cat")


@needs_transformers
def test_a_damaged_text_encoder(pipe: Pipeline, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "toy")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="text_encoder: not a T5 encoder with a tokenizer beside it"):
        Pipeline.from_pretrained(folder)
