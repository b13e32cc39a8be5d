"""The diffusers shells: they keep keys and values of the plain networks, and both sides read each other's folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModelMixin

from arimg import Pipeline, hub
from arimg.checkpoints import PipelineSettings, load_component, read_index, save_component
from arimg.config import to_dict
from arimg.control import adapter
from arimg.errors import CheckpointError
from arimg.models import ar, generators, students, var, var_students
from arimg.tokenizers import kl, multiscale, vq
from tests.toy import toy_text_encoder

TOKENIZER: dict[str, Any] = dict(codebook_size=24, base_channels=32, multipliers=(1, 1), res_blocks=1, z_channels=8)
TRANSFORMER: dict[str, Any] = dict(vocab_size=24, dim=32, layers=2, heads=2, ffn_hidden=64, block_size=16,
                                   num_classes=4, inject_layers=(0, 1))
CONTROL: dict[str, Any] = dict(embed_dim=16, depth=1, heads=2, ffn_hidden=32, patch=2, stride=2, dim=32, points=2)
NEXT_SCALE: dict[str, Any] = dict(vocab_size=24, codebook_dim=4, scales=((1, 1), (4, 4)), dim=32, layers=2, heads=2,
                                  num_classes=4)
CASES = {
    "tokenizer": (hub.VQTokenizer, vq.VQTokenizer, vq.VQConfig(**TOKENIZER)),
    "multi-scale tokenizer": (hub.MultiscaleTokenizer, multiscale.MultiscaleTokenizer, multiscale.MultiscaleConfig(
        codebook_size=24, codebook_dim=4, base_channels=32, multipliers=(1, 1), res_blocks=1, scales=((1, 1), (2, 2)))),
    "KL tokenizer": (hub.KLTokenizer, kl.KLTokenizer, kl.KLConfig(
        base_channels=32, multipliers=(1, 1), res_blocks=1, latent_channels=4, attention_levels=())),
    "transformer": (hub.ARTransformer, ar.ARTransformer, ar.ARConfig(**TRANSFORMER)),
    "caption transformer": (hub.ARTransformer, ar.ARTransformer, ar.ARConfig(**{
        **TRANSFORMER, "conditioning": "text", "caption_dim": 8, "caption_length": 4})),
    "next-scale transformer": (hub.VARTransformer, var.VARTransformer, var.VARConfig(**NEXT_SCALE)),
    "one-step student": (hub.ARStudent, students.ARStudent, students.ARStudentConfig(**TRANSFORMER, timesteps=(0, 3))),
    "next-scale student": (hub.VARStudent, var_students.VARStudent, var_students.VARStudentConfig(
        **NEXT_SCALE, timesteps=(0, 1), split=1)),
    "one-step generator": (hub.ARGenerator, generators.ARGenerator, generators.ARGeneratorConfig(
        **TRANSFORMER, head_width=16, head_depth=1)),
    "next-scale generator": (hub.VARGenerator, generators.VARGenerator, generators.VARGeneratorConfig(
        **NEXT_SCALE, head_width=16, head_depth=1)),
    "control": (hub.ControlAdapter, adapter.ControlAdapter, adapter.ControlConfig(**CONTROL)),
}
SETTINGS = PipelineSettings(title="toy", class_names=("a", "b", "c", "d"), control_types=("canny",), size=(8, 8),
                            cfg=2.0)


def shell(name: str) -> Any:
    kind, _, config = CASES[name]
    torch.manual_seed(0)
    module = kind(**to_dict(config))
    with torch.no_grad():
        for parameter in module.parameters():      # nothing stays at zero, so that every path matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def same_weights(left: torch.nn.Module, right: torch.nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key].to(dtype), theirs[key]) for key in ours)


@pytest.fixture
def pipeline() -> hub.ArimgPipeline:
    return hub.ArimgPipeline(shell("tokenizer"), shell("transformer"), shell("control"), settings=to_dict(SETTINGS))


@pytest.mark.parametrize("name", CASES)
def test_shells_change_neither_keys_nor_initial_values(name: str) -> None:
    kind, plain, config = CASES[name]
    torch.manual_seed(7)
    shelled = kind(**to_dict(config))
    torch.manual_seed(7)
    assert same_weights(plain(config), shelled)
    assert shelled.config == to_dict(config)


def test_config_reads_as_a_dictionary_and_as_the_dataclass() -> None:
    module = shell("transformer")
    assert module.config["layers"] == module.config.layers == 2
    assert module.config.head_dim == 16 and module.config.inject_layers == (0, 1)
    assert len(module.layers) == 2      # the sub-modules, not the config entry of the same name
    assert copy.deepcopy(module).config == module.config
    assert hub.ARTransformer.from_config(module.config).config == module.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_shells_round_trip(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module = shell(name)
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(loaded, ModelMixin) and loaded.dtype == dtype and not loaded.training
    assert same_weights(module, loaded, dtype)
    assert same_weights(module, load_component(tmp_path, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_stay_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    module = shell("transformer")
    module.save_pretrained(tmp_path)
    loaded = hub.ARTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(loaded.rotary_table((4, 4)), module.rotary_table((4, 4)))
    assert loaded.rotary_table((4, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_shells_read_what_arimg_writes(tmp_path: Path, name: str) -> None:
    kind, plain, config = CASES[name]
    module = plain(config)
    save_component(module, tmp_path / "part")
    assert same_weights(module, kind.from_pretrained(tmp_path / "part"))


def test_sharded_shells(tmp_path: Path) -> None:
    module = shell("tokenizer")
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_weights(module, load_component(tmp_path))
    assert same_weights(module, hub.VQTokenizer.from_pretrained(tmp_path))


def test_pipelines_read_each_others_folders(tmp_path: Path, pipeline: hub.ArimgPipeline) -> None:
    pipeline.save_pretrained(tmp_path / "by diffusers")
    plain = Pipeline.from_pretrained(tmp_path / "by diffusers", device="cpu", dtype="float32")
    assert type(plain.transformer) is ar.ARTransformer and plain.settings == SETTINGS
    plain.save_pretrained(tmp_path / "by arimg")
    again = hub.ArimgPipeline.from_pretrained(tmp_path / "by arimg")
    for part in ("tokenizer", "transformer", "control"):
        assert same_weights(getattr(pipeline, part), getattr(again, part))
    assert read_index(tmp_path / "by diffusers") == read_index(tmp_path / "by arimg")
    codes = [call(class_id=1, cfg=2.0, seed=5).codes for call in (pipeline, plain, again)]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_shells_in_a_plain_pipeline_can_be_saved(tmp_path: Path, pipeline: hub.ArimgPipeline) -> None:
    pipeline.plain().save_pretrained(tmp_path / "p")
    assert same_weights(pipeline.transformer, load_component(tmp_path / "p/transformer"))


def test_bfloat16_pipeline(tmp_path: Path, pipeline: hub.ArimgPipeline) -> None:
    pipeline.save_pretrained(tmp_path / "p")
    loaded = hub.ArimgPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded(class_id=1, output_type="pt").images.shape == (1, 3, 8, 8)


def test_call_aliases(pipeline: hub.ArimgPipeline) -> None:
    control = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = pipeline(control, class_id=2, cfg=3.0, control_scale=0.5, control_start=0.25, control_end=0.75, seed=11, n=2,
                    output_type="np")
    theirs = pipeline(control, class_labels=2, guidance_scale=3.0, controlnet_conditioning_scale=0.5,
                      control_guidance_start=0.25, control_guidance_end=0.75, num_images_per_prompt=2, height=8,
                      width=8, generator=torch.Generator().manual_seed(11), output_type="np")
    assert torch.equal(ours.codes, theirs.codes)
    assert isinstance(theirs.images, np.ndarray) and theirs.images.shape == (2, 8, 8, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    listed = pipeline(control, class_labels=[2, 2], guidance_scale=3.0, controlnet_conditioning_scale=0.5,
                      control_guidance_start=0.25, control_guidance_end=0.75, generator=generators,
                      output_type="latent")
    assert torch.equal(ours.codes, listed.codes) and torch.equal(listed.images, listed.latents)


def test_pil_tuple_and_callback(pipeline: hub.ArimgPipeline) -> None:
    seen = []
    images, = pipeline(class_labels=0, return_dict=False,
                       callback_on_step_end=lambda pipe, step, tokens, values: seen.append((pipe, step)) or {})
    assert images[0].size == (8, 8)
    assert seen and all(pipe is pipeline for pipe, _ in seen) and seen[0][1] == 0
    assert pipeline(class_labels=0)[0][0].size == (8, 8)


def test_text_pipelines_read_each_others_folders(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = toy_text_encoder(width=8)
    pipeline = hub.ArimgPipeline(
        shell("tokenizer"), shell("caption transformer"), text_encoder=text.model, text_tokenizer=text.tokenizer,
        settings=to_dict(PipelineSettings(size=(8, 8), cfg=2.0)))
    pipeline.save_pretrained(tmp_path / "by diffusers")
    plain = Pipeline.from_pretrained(tmp_path / "by diffusers", device="cpu", dtype="float32")
    plain.save_pretrained(tmp_path / "by arimg")
    again = hub.ArimgPipeline.from_pretrained(tmp_path / "by arimg")
    codes = [call(prompt="a cat", num_images_per_prompt=2).codes for call in (pipeline, plain, again)]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_untrusted_folders_are_refused(tmp_path: Path, pipeline: hub.ArimgPipeline) -> None:
    pipeline.save_pretrained(tmp_path / "p")
    index = tmp_path / "p/model_index.json"
    index.write_text(index.read_text().replace('"arimg.hub",\n    "VQTokenizer"', '"os",\n    "VQTokenizer"'))
    with pytest.raises(CheckpointError, match="wants code from 'os'"):
        hub.ArimgPipeline.from_pretrained(tmp_path / "p")
