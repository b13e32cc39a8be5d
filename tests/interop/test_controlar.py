"""ControlAR key maps: both naming schemes, equality with transformers, dead weights, inferred sizes, faults."""

import re
from types import SimpleNamespace

import pytest
import torch

from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.control.encoder import ControlEncoder, EncoderConfig
from arimg.errors import CheckpointError
from arimg.interop.controlar import control_config_from_controlar, encoder_sizes, encoder_state, split_controlar

OLD_NAMES = {
    "vit": {r"^layers\.": "encoder.layer.", r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense"},
    "dinov2": {},
}
OLD_ATTENTION = {r"attention\.q_proj": "attention.attention.query", r"attention\.k_proj": "attention.attention.key",
                 r"attention\.v_proj": "attention.attention.value", r"attention\.o_proj": "attention.output.dense"}


def hugging_face(kind):
    """A toy model of the installed transformers (5.x naming), every parameter random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
    if kind == "vit":
        config = transformers.ViTConfig(**shared, intermediate_size=80, image_size=64, patch_size=16)
        model = transformers.ViTModel(config).eval()
        reference = SimpleNamespace(model=model, run=lambda x: model(x, interpolate_pos_encoding=True))
    else:
        config = transformers.Dinov2Config(**shared, mlp_ratio=2, image_size=70, patch_size=14)
        model = transformers.Dinov2Model(config).eval()
        reference = SimpleNamespace(model=model, run=model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return reference


def rename(state, kind, naming):
    """The state dict as transformers 4 or 5 writes it."""
    rules = {**OLD_NAMES[kind], **OLD_ATTENTION} if naming == "transformers 4" else {}
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def controlar(kind="vit", naming="transformers 4", dim=20):
    """A state dict laid out like ControlAR's, with random weights (the same in both namings)."""
    encoder = rename(hugging_face(kind).model.state_dict(), kind, naming)
    state = {f"adapter.model.{key}": tensor for key, tensor in encoder.items()}
    shapes = {"adapter_mlp.fc1.weight": (dim, 48), "adapter_mlp.fc2.weight": (dim, dim),
              "condition_mlp.cap_proj.fc1.weight": (dim, dim), "condition_mlp.cap_proj.fc2.weight": (dim, dim),
              "condition_mlp.uncond_embedding": (16, dim), "condition_embeddings.weight": (96, dim),
              "condition_norm.weight": (dim,), "tok_embeddings.weight": (96, dim), "norm.weight": (dim,)}
    shapes |= {f"condition_layers.{k}.fc{n}.weight": (dim, dim) for k in range(3) for n in (1, 2)}
    return state | {key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("naming", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("kind, patch, image_size, sizes", [
    ("vit", 16, 64, [(64, 64), (96, 96), (32, 80)]), ("dinov2", 14, 70, [(70, 70), (98, 98), (28, 112)])])
def test_same_tokens_as_transformers(kind, patch, image_size, sizes, naming):
    reference = hugging_face(kind)
    weights = encoder_state(rename(reference.model.state_dict(), kind, naming))
    config = EncoderConfig(**encoder_sizes(weights.state, {"num_attention_heads": 3}), stride=patch)
    assert (config.kind, config.patch, config.image_size, config.depth) == (kind, patch, image_size, 2)
    encoder = ControlEncoder(config).eval()
    encoder.load_state_dict(weights.state)
    for size in sizes:
        image = torch.rand(2, 3, *size) * 2 - 1
        with torch.no_grad():
            error = (encoder(image) - reference.run(image).last_hidden_state[:, 1:]).abs().max()
        assert error < 1e-5, (size, error)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_both_namings_give_the_same_control_state(kind):
    old, new = (split_controlar(controlar(kind, naming)).control for naming in ("transformers 4", "transformers 5"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("kind, dead", [
    ("vit", {"adapter.model.pooler.dense.weight", "adapter.model.pooler.dense.bias"}),
    ("dinov2", {"adapter.model.embeddings.mask_token"})])
def test_every_key_is_loaded_or_reported(kind, dead):
    state = controlar(kind)
    weights = split_controlar(state)
    assert set(weights.dropped) == dead | {"condition_embeddings.weight", "condition_norm.weight",
                                           "condition_mlp.uncond_embedding"}
    assert set(weights.transformer) == {"tok_embeddings.weight", "norm.weight"}
    config = control_config_from_controlar(state, {"num_attention_heads": 3}, types=("hed",))
    assert (config.kind, config.embed_dim, config.dim, config.points, config.types) == (kind, 48, 20, 3, ("hed",))
    adapter = ControlAdapter(config)
    adapter.load_state_dict(weights.control)
    assert torch.equal(adapter.fusion.condition_mlp.fc2.weight, state["condition_mlp.cap_proj.fc2.weight"])
    assert torch.equal(adapter.fusion.condition_layers[2].fc1.weight, state["condition_layers.2.fc1.weight"])


def test_query_key_value_are_stacked_in_that_order():
    state = controlar()
    prefix = "adapter.model.encoder.layer.1.attention.attention."
    stacked = split_controlar(state).control["encoder.vit.blocks.1.attn.qkv.bias"]
    assert torch.equal(stacked, torch.cat([state[f"{prefix}{name}.bias"] for name in ("query", "key", "value")]))


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12)])
def test_heads_of_the_published_encoders(width, heads):
    shapes = {"vit.patch_embed.proj.weight": (width, 3, 14, 14), "vit.pos_embed": (1, 1370, width),
              "vit.blocks.0.ls1.gamma": (width,), "vit.blocks.0.mlp.fc1.weight": (4 * width, width)}
    assert encoder_sizes({key: torch.empty(shape) for key, shape in shapes.items()}) == dict(
        kind="dinov2", embed_dim=width, depth=1, heads=heads, ffn_hidden=4 * width, patch=14, image_size=518,
        norm_eps=None)


def test_epsilon_of_the_layer_norms_is_that_of_the_encoder_config():
    torch.manual_seed(0)
    state = encoder_state(hugging_face("vit").model.state_dict()).state
    written = {"num_attention_heads": 3, "layer_norm_eps": 0.25}
    encoder = ControlEncoder(EncoderConfig(**encoder_sizes(state, written), stride=16))
    assert {module.eps for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)} == {0.25}


@pytest.mark.parametrize("kind, prefix", [("vit", "vit."), ("dinov2", "dinov2."), ("vit", ""), ("dinov2", "")])
def test_bare_encoder_files_load_into_a_new_adapter(kind, prefix):
    state = {prefix + key: tensor for key, tensor in hugging_face(kind).model.state_dict().items()}
    state |= {"classifier.weight": torch.zeros(5, 48), "classifier.bias": torch.zeros(5)}
    weights = encoder_state(state)
    assert {"classifier.weight", "classifier.bias"} < set(weights.dropped)
    sizes = encoder_sizes(weights.state, {"num_attention_heads": 3})
    adapter = ControlAdapter(ControlConfig(**sizes, stride=16, dim=20))
    adapter.load_encoder(weights.state)
    assert torch.equal(adapter.encoder.vit.cls_token, state[f"{prefix}embeddings.cls_token"])


def test_defect_09_a_renamed_linear_layer_is_named_and_never_left_random():
    state = rename(hugging_face("vit").model.state_dict(), "vit", "transformers 4")
    weights = encoder_state({key.replace("attention.query", "attention.q"): tensor for key, tensor in state.items()})
    config = ControlConfig(**encoder_sizes(weights.state, {"num_attention_heads": 3}), stride=16)
    with pytest.raises(CheckpointError) as caught:
        ControlAdapter(config).load_encoder(weights.state)
    assert "missing: vit.blocks.0.attn.qkv.weight" in str(caught.value)
    assert "unexpected: encoder.layer.0.attention.attention.q.weight" in str(caught.value)


def test_unknown_keys_reach_the_strict_load_under_their_own_name():
    state = controlar()
    state |= {key: torch.zeros(1) for key in ("adapter.model.extra.weight", "condition_layers.0.fc3.weight")}
    control = split_controlar(state).control
    assert "encoder.extra.weight" in control and "fusion.condition_layers.0.fc3.weight" in control
    with pytest.raises(RuntimeError, match="encoder.extra.weight"):
        ControlAdapter(control_config_from_controlar(state, {"num_attention_heads": 3})).load_state_dict(control)


def test_plain_llamagen_file_is_told_apart():
    with pytest.raises(CheckpointError, match="--from llamagen"):
        split_controlar({"tok_embeddings.weight": torch.zeros(2, 2)})


def test_unknown_head_count_asks_for_the_encoder_config():
    with pytest.raises(CheckpointError, match="48 wide, no multiple of 64.*num_attention_heads"):
        control_config_from_controlar(controlar())


@pytest.mark.parametrize("key", ["adapter_mlp.fc2.weight", "adapter.model.embeddings.position_embeddings",
                                 "adapter.model.embeddings.patch_embeddings.projection.weight"])
def test_incomplete_file_names_the_missing_key(key):
    state = controlar()
    del state[key]
    with pytest.raises(CheckpointError, match="is missing"):
        control_config_from_controlar(state, {"num_attention_heads": 3})


def test_position_table_must_be_square():
    state = controlar() | {"adapter.model.embeddings.position_embeddings": torch.zeros(1, 8, 48)}
    with pytest.raises(CheckpointError, match="7 rows beside the class token, which is no square grid"):
        control_config_from_controlar(state, {"num_attention_heads": 3})
