"""ControlAR: control encoder, fusion, teacher-forced logits of every size, greedy generation of every run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.control.adapter import ControlAdapter
from arimg.control.base import get_type
from arimg.control.fusion import combine, injection_layers
from arimg.interop.controlar import control_config_from_controlar, split_controlar
from arimg.interop.llamagen import ar_config_from_llamagen, transformer_from_llamagen
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from tests.parity.checkers.llamagen_gpt import check_run, square, stored_condition
from tests.parity.fixture import Fixture

DINOV2_STRIDE = 16      # pixels of the control per token; the ViT of class-conditional models resizes nothing


def check(fixture: Fixture) -> None:
    """Compare all outputs. A fixture with several sizes puts `<H>x<W>_` before the names of each."""
    adapter, model = build(fixture)
    condition = stored_condition(fixture)
    for name in list(fixture.tensors):
        if name.startswith("in.") and name.endswith("tokens"):
            check_size(fixture, adapter, model, condition, prefix=name[len("in."):-len("tokens")])
    if "out.freqs_cis" in fixture:
        fixture.compare("out.freqs_cis", model.rotary_table(square(model.config.block_size)))
    for run, settings in fixture.settings.get("runs", {}).items():
        check_controlled_run(fixture, adapter, model, condition, run, settings)


def build(fixture: Fixture) -> tuple[ControlAdapter, ARTransformer]:
    """Both networks with the fixture's weights; sizes read off the weights must agree with the configs as written."""
    weights = split_controlar(fixture.state_dict())
    places = injection_layers(fixture.spec["config"]["n_layer"])
    assert list(places) == fixture.spec.get("injection_layers", list(places))
    config = ARConfig(**ar_config_from_llamagen(fixture.spec["config"]), inject_layers=places)
    assert config.ffn_hidden == fixture.spec.get("ffn_hidden", config.ffn_hidden)
    model = ARTransformer(config)
    model.load_state_dict(transformer_from_llamagen(weights.transformer))
    encoder = fixture.spec["encoder_config"]
    stride = encoder["patch_size"] if encoder["type"] == "ViT" else DINOV2_STRIDE
    adapter = ControlAdapter(control_config_from_controlar(fixture.state_dict(), encoder, stride=stride))
    check_encoder_config(adapter, encoder)
    adapter.load_state_dict(weights.control)
    return adapter.eval(), model.eval()


def check_encoder_config(adapter: ControlAdapter, written: dict[str, Any]) -> None:
    """The inferred encoder is the one that the Hugging Face config describes."""
    config = adapter.config
    ffn_hidden = written.get("intermediate_size", int(written["hidden_size"] * written.get("mlp_ratio", 4)))
    assert (config.kind, config.embed_dim, config.depth, config.heads, config.ffn_hidden) == (
        written["type"].lower(), written["hidden_size"], written["num_hidden_layers"], written["num_attention_heads"],
        ffn_hidden)
    assert config.image_size is not None and config.patch == written["patch_size"]
    assert config.image_size // config.patch == written["image_size"] // written["patch_size"]


def resample_of(fixture: Fixture) -> str:
    """How the fixture's type of control is resized; class-conditional models resize nothing."""
    return get_type(fixture.spec["config"].get("condition_type", "canny")).resample


@torch.no_grad()
def check_size(fixture: Fixture, adapter: ControlAdapter, model: ARTransformer, condition: Condition,
               prefix: str) -> None:
    """Everything but generation, for the control `in.<prefix>control`."""
    maps_B3HW, tokens_BL = fixture[f"in.{prefix}control"], fixture[f"in.{prefix}tokens"]
    grid = token_grid(adapter, maps_B3HW)
    resample = resample_of(fixture)
    encoded_BLE = adapter.tokens(maps_B3HW, resample)
    projected_BLD = adapter.fusion.adapter_mlp(encoded_BLE)
    inject_KBLD = adapter.inject(maps_B3HW, resample)
    logits_BLV = model(tokens_BL, condition, grid, inject_KBLD)
    got = {
        "encoder_tokens": encoded_BLE,
        "encoder_tokens_other_resize": adapter.tokens(maps_B3HW, "bicubic" if resample == "nearest" else "nearest"),
        "adapter_mlp": projected_BLD,
        "control_tokens": adapter.fusion.condition_mlp(projected_BLD),
        **{f"control_layer_{k}": inject_BLD for k, inject_BLD in enumerate(inject_KBLD)},
        "logits": logits_BLV,
        "loss": F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten()),
    }
    if f"out.{prefix}logits_dropped" in fixture:
        got["logits_dropped"] = model(tokens_BL, model.null(condition), grid)
    for name, value in got.items():
        if f"out.{prefix}{name}" in fixture:
            fixture.compare(f"out.{prefix}{name}", value)
    if f"in.{prefix}attn_mask" in fixture:
        mask_BSS = fixture[f"in.{prefix}attn_mask"][:, 0, :-1, :-1]
        fixture.compare(f"out.{prefix}logits", model(tokens_BL, condition, grid, inject_KBLD, mask_BSS))


@torch.no_grad()
def check_controlled_run(fixture: Fixture, adapter: ControlAdapter, model: ARTransformer, condition: Condition,
                         run: str, settings: dict[str, Any]) -> None:
    """One greedy generation. The original ignores the strength in class-conditional models and where there is no
    guidance (defects 12 and 13)."""
    maps_B3HW = fixture[control_name(fixture, settings)]
    heeded = settings["cfg_scale"] > 1 and model.config.conditioning == "text"
    strength = settings.get("control_strength", 1.0) if heeded else 1.0
    inject_KBLD: Tensor = combine([adapter.inject(maps_B3HW, resample_of(fixture))], [strength])
    check_run(fixture, model, condition, run, settings, inject_KBLD)


def control_name(fixture: Fixture, settings: dict[str, Any]) -> str:
    """The run's control: named, or of the run's size, or the only one."""
    sized = f"in.{settings.get('size')}_control"
    return settings.get("control", sized if sized in fixture else "in.control")


def token_grid(adapter: ControlAdapter, maps_B3HW: Tensor) -> tuple[int, int]:
    """(h, w) in tokens."""
    height, width = maps_B3HW.shape[-2:]
    return height // adapter.config.stride, width // adapter.config.stride
