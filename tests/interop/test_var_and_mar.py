"""Files of VAR and MAR, laid out as published, at toy size through `convert` and at full size on no memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arimg.checkpoints import read_index
from arimg.errors import ArimgError, CheckpointError, InputError, UnknownNameError
from arimg.interop.convert import convert
from arimg.interop.convnet import convnet_from_ldm
from arimg.interop.kl import infer_kl_config, kl_from_ldm
from arimg.interop.var_vae import infer_multiscale_config, multiscale_from_var
from arimg.pipeline import Pipeline
from arimg.presets import KL_PRESETS
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from tests.parity.fixture import load

PARITY = Path(__file__).parents[1] / "data" / "parity"
SCALES = ((1, 1), (2, 2), (3, 3), (4, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Full size


def full_size(table: str, name: str) -> dict[str, Tensor]:
    """A published state dict without memory."""
    content = json.loads((PARITY / table).read_text())
    state = {}
    if "models" in content:
        entries = [(key, shape, *(count or [1])) for key, shape, *count in content["models"][name]["keys"]]
    else:
        entries = [(key, shape, count) for key, (shape, count) in content[name]["keys"].items()]
    for key, shape, count in entries:
        for i in range(count):
            state[key.replace("{i}", str(i))] = torch.empty(shape, device="meta")
    return state


def same_layout(network: nn.Module, state: dict[str, Tensor]) -> bool:
    own = {key: tensor.shape for key, tensor in network.state_dict().items()}
    return own == {key: tensor.shape for key, tensor in state.items()}


def test_released_var_tokenizer_fits() -> None:
    state = full_size("var_dd_state_dicts.json", "vae_ch160v4096z32")
    assert infer_multiscale_config(state) == MultiscaleConfig()
    with torch.device("meta"):
        tokenizer = MultiscaleTokenizer(MultiscaleConfig())
    assert same_layout(tokenizer, multiscale_from_var(state))


def test_released_kl_tokenizer_fits() -> None:
    state = full_size("mar_state_dicts.json", "kl16_vae")
    assert infer_kl_config(state) == KLConfig() == KLConfig(**KL_PRESETS["KL-16"].config())
    with torch.device("meta"):
        tokenizer = KLTokenizer(KLConfig())
    assert same_layout(tokenizer, kl_from_ldm(state)) and len(state) == 312


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_levels_of_the_decoder_are_numbered_from_the_full_resolution() -> None:
    state = {f"decoder.up.{level}.block.0.conv1.bias": torch.full((1,), level) for level in range(3)}
    mapped = convnet_from_ldm(state)
    assert {key: int(tensor) for key, tensor in mapped.items()} == {
        f"decoder.conv_blocks.{order}.res.0.conv1.bias": level for order, level in ((0, 2), (1, 1), (2, 0))}


def test_fused_attention_is_parted_and_unknown_keys_stay() -> None:
    mapped = convnet_from_ldm({"encoder.mid.attn_1.qkv.bias": torch.arange(6),
                               "unknown.mid.block_1.bias": torch.ones(1)})
    assert {key: tensor.tolist() for key, tensor in mapped.items()} == {
        "encoder.mid.1.q.bias": [0, 1], "encoder.mid.1.k.bias": [2, 3], "encoder.mid.1.v.bias": [4, 5],
        "unknown.mid.block_1.bias": [1.0]}


@pytest.mark.parametrize(("theirs", "ours"), [
    ("quant_resi.qresi.", "phis.0."), ("quant_resi.qresi_ls.3.", "phis.3."), ("quant_resi.2.", "phis.2."),
])
def test_spellings_of_the_phis(theirs: str, ours: str) -> None:
    state = {f"quantize.{theirs}weight": torch.ones(1), "quantize.ema_vocab_hit_SV": torch.ones(7, 3)}
    assert list(multiscale_from_var(state)) == [f"quantize.{ours}weight"]


@pytest.mark.parametrize(("phis", "expected"), [
    ({}, {"phis": 0, "residual_ratio": 0.0}), ({"qresi.": 1}, {"phis": 1}),
    ({"qresi_ls.0.": 1, "qresi_ls.1.": 1}, {"phis": 2}), ({f"{k}.": 1 for k in range(4)}, {"phis": 0}),
])
def test_sharing_is_read_off_the_keys(phis: dict[str, int], expected: dict[str, Any]) -> None:
    state = {key: tensor for key, tensor in load(PARITY / "var_vqvae.safetensors").state_dict().items()
             if "quant_resi" not in key}
    state |= {f"quantize.quant_resi.{name}weight": torch.ones(8, 8, 3, 3) for name in phis}
    config = infer_multiscale_config(state, SCALES)
    assert {name: getattr(config, name) for name in expected} == expected


# ---------------------------------------------------------------------------------------------------------------------
# Toy models


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def var_files(tmp_path: Path) -> dict[str, Path]:
    """The tokenizer of one fixture with the quantiser of the other's transformer, flat as VAR publishes them."""
    tokenizer, model = (load(PARITY / f"{name}.safetensors") for name in ("var_vqvae", "var_transformer"))
    return {"tokenizer": saved(tmp_path / "vae_ch160v4096z32.pth", tokenizer.state_dict() | model.state_dict("vae.")),
            "transformer": saved(tmp_path / "var_d16.pth", model.state_dict("var."))}


@pytest.fixture
def mar_files(tmp_path: Path) -> dict[str, Path]:
    """As MAR publishes them: the command line in a namespace, training state, moving averages."""
    state = load(PARITY / "mar_generate.safetensors").state_dict()
    training = {"model": {key: torch.zeros_like(tensor) for key, tensor in state.items()}, "model_ema": state,
                "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 799, "scaler": {"scale": 1.0},
                "args": argparse.Namespace(model="mar_base", vae_embed_dim=4)}
    return {"tokenizer": saved(tmp_path / "kl16.ckpt", {"model": load(PARITY / "mar_kl_vae.safetensors").state_dict()}),
            "transformer": saved(tmp_path / "checkpoint-last.pth", training)}


def refusal(source: str, files: list[Path], out: Path, kind: type[ArimgError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(source, files, out, **options)
    assert not out.exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrapped", [False, True])
def test_var_gives_the_fixture_codes(tmp_path: Path, var_files: dict[str, Path], wrapped: bool) -> None:
    fixture = load(PARITY / "var_transformer.safetensors")
    if wrapped:         # a file of VAR's trainer
        state = torch.load(var_files["transformer"])
        saved(var_files["transformer"], {"epoch": 249, "trainer": {"var_wo_ddp": state}, "args": {"depth": 2}})
    out = convert("var", list(var_files.values()), tmp_path / "out")
    pipe = Pipeline.from_pretrained(out, device="cpu", dtype="float32")
    assert pipe.tokenizer.config.scales == SCALES == pipe.transformer.config.scales
    settings = read_index(out).settings
    assert (settings.size, settings.decoder, settings.licence) == ((8, 8), "scale", "MIT")
    result = pipe(class_id=fixture["in.label"].tolist(), cfg=2.5, temperature=0)
    assert torch.equal(result.codes, fixture["out.greedy_cfg1p5.idx"])
    torch.testing.assert_close(result.latents, fixture["out.greedy_cfg1p5.f_hat"], rtol=0, atol=1e-4)
    assert result.images[0].size == (8, 8)


def test_mar_files_become_a_pipeline(tmp_path: Path, mar_files: dict[str, Path]) -> None:
    notices: list[str] = []
    out = convert("mar", list(mar_files.values()), tmp_path / "out", heads=4, weights="ema", notify=notices.append)
    assert any("args" in line and "optimizer" in line for line in notices)
    assert any("kl16.ckpt: not KL-16" in line for line in notices)
    settings = read_index(out).settings
    assert (settings.size, settings.decoder, settings.licence) == ((16, 16), "masked", "MIT")
    pipe = Pipeline.from_pretrained(out, device="cpu", dtype="float32")
    state = load(PARITY / "mar_generate.safetensors").state_dict()
    assert all(torch.equal(tensor, pipe.transformer.state_dict()[key]) for key, tensor in state.items())
    fixture = load(PARITY / "mar_kl_vae.safetensors")
    with torch.no_grad():
        tokens_BChw = pipe.tokenizer.encode(fixture["in.x"], fixture["in.eps"])
    torch.testing.assert_close(tokens_BChw, fixture["out.latent_scaled"], rtol=1e-4, atol=1e-5)


def test_patches_come_from_the_transformer(tmp_path: Path, mar_files: dict[str, Path]) -> None:
    """16 numbers per token of 4 latent channels: squares of 2 x 2."""
    state = load(PARITY / "mar_generate.safetensors").state_dict()
    for key in ("z_proj.weight", "diffloss.net.input_proj.weight"):
        state[key] = state[key].repeat(1, 4)
    for key in ("diffloss.net.final_layer.linear.weight", "diffloss.net.final_layer.linear.bias"):
        state[key] = torch.cat([state[key]] * 4)
    patched = saved(tmp_path / "patched.pth", {"model_ema": state})
    out = convert("mar", [mar_files["tokenizer"], patched], tmp_path / "out", heads=4)
    pipe = Pipeline.from_pretrained(out, device="cpu", dtype="float32")
    assert pipe.tokenizer.config.patch_size == 2 and pipe.tokenizer.stride == 8
    assert read_index(out).settings.size == (32, 32)


def test_refusals(tmp_path: Path, var_files: dict[str, Path], mar_files: dict[str, Path]) -> None:
    out, var, mar = tmp_path / "out", list(var_files.values()), list(mar_files.values())
    encoder = saved(tmp_path / "vit.pt", {"embeddings.patch_embeddings.projection.weight": torch.ones(1, 3, 2, 2)})
    assert "VAR has no control encoder" in refusal("var", [*var, encoder], out)
    assert "MAR has no control encoder" in refusal("mar", [*mar, encoder], out)
    assert "this tokenizer is none for --from mar; it belongs to --from var" in refusal("mar", [var[0], mar[1]], out)
    assert "this transformer is none for --from var; it belongs to --from mar" in refusal("var", [var[0], mar[1]], out)
    assert "kl16.ckpt: this tokenizer is none for --from llamagen; it belongs to --from mar" in refusal(
        "llamagen", mar, out)
    assert "no transformer there" in refusal("var", var[:1], out)
    assert "--image-size 256: this model paints 8x8" in refusal("var", var, out, kind=InputError, image_size=256)
    assert "2 class names for 10 classes" in refusal("var", var, out, kind=InputError, class_names=["a", "b"])
    assert "d17" in refusal("var", var, out, kind=UnknownNameError, preset="d17")
    assert "XXL" in refusal("mar", mar, out, kind=UnknownNameError, preset="XXL")


def test_damaged_tokenizers(tmp_path: Path, var_files: dict[str, Path], mar_files: dict[str, Path]) -> None:
    out = tmp_path / "out"
    for source, files, key in (("var", var_files, "decoder.mid.attn_1.qkv.weight"),
                               ("mar", mar_files, "decoder.mid.attn_1.q.weight")):
        content = torch.load(files["tokenizer"])
        state = content.get("model", content)
        del state[key]
        saved(files["tokenizer"], content)
        assert "missing: decoder.mid.1." in refusal(source, list(files.values()), out, heads=4)
        del state["quant_conv.weight"]
        saved(files["tokenizer"], content)
        assert "quant_conv.weight missing" in refusal(source, list(files.values()), out, heads=4)


def test_quantisers_that_do_not_belong_to_the_transformer(tmp_path: Path, var_files: dict[str, Path]) -> None:
    state, out, files = torch.load(var_files["tokenizer"]), tmp_path / "out", list(var_files.values())
    saved(files[0], state | {"quantize.embedding.weight": torch.ones(7, 8)})
    assert "the transformer knows 24 codes of 8 channels, the tokenizer 7 of 8" in refusal("var", files, out)
    phis = {key: tensor for key, tensor in state.items() if "quant_resi" not in key}
    saved(files[0], phis | {f"quantize.quant_resi.{k}.weight": torch.ones(8, 8, 3, 3) for k in range(3)})
    assert "3 phis, one per scale, for 4 scales" in refusal("var", files, out)


def test_a_file_that_runs_code_is_refused(tmp_path: Path, mar_files: dict[str, Path]) -> None:
    path = saved(tmp_path / "kl16.ckpt", {"model": {"a": torch.ones(1)}, "callback": Path("/")})
    assert "refused, because it is a pickle that runs code" in refusal("mar", [path, mar_files["transformer"]],
                                                                       tmp_path / "out")
