"""VAR files laid out as published, at toy size: what weights tell, and the way through `convert` to greedy codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arimg.errors import CheckpointError
from arimg.interop.convert import convert
from arimg.interop.var import infer_var_config, transformer_from_var, var_config_from_release
from arimg.pipeline import Pipeline
from tests.models.toy_var import toy_var

FIXTURES = Path(__file__).parents[1] / "data/parity"


def states(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The VAE's and the transformer's original state dicts, which belong together, and the fixture's other tensors."""
    tensors, vae = load_file(FIXTURES / f"{name}.safetensors"), load_file(FIXTURES / "var_vqvae.safetensors")
    state = {key[3:]: tensor for key, tensor in vae.items() if key.startswith("sd.")}
    state |= {key[7:]: tensor for key, tensor in tensors.items() if key.startswith("sd.vae.")}
    var = {key[7:]: tensor for key, tensor in tensors.items() if key.startswith("sd.var.")}
    return state, var, {key: tensor for key, tensor in tensors.items() if not key.startswith("sd.")}


@pytest.mark.parametrize("name, wrapped", [
    ("var_transformer", lambda state: state),
    ("var_transformer", lambda state: {"epoch": 3, "trainer": {"var_wo_ddp": state, "config": {}}}),
    ("var_transformer_shared_aln", lambda state: state)])
def test_published_files_paint_the_originals_codes(tmp_path: Path, name: str, wrapped: Any) -> None:
    vae, var, tensors = states(name)
    torch.save(vae, tmp_path / "vae_ch160v4096z32.pth")
    torch.save(wrapped(var), tmp_path / "var_d16.pth")
    files = [tmp_path / "var_d16.pth", tmp_path / "vae_ch160v4096z32.pth"]
    folder = convert("var", files, tmp_path / "out", heads=4)
    pipe = Pipeline.from_pretrained(folder, dtype="float32")
    settings = pipe.settings
    assert (settings.decoder, settings.cfg, settings.top_k, settings.top_p) == ("scale", 2.5, 900, 0.96)
    out = pipe(class_id=tensors["in.label"].tolist(), cfg=2.5, top_k=1)
    assert torch.equal(out.codes, tensors["out.greedy_cfg1p5.idx"])
    torch.testing.assert_close(out.latents, tensors["out.greedy_cfg1p5.f_hat"])
    assert out.images[0].size == pipe.settings.size and out.stats.forward_passes == 4


def test_files_of_two_models_are_refused(tmp_path: Path) -> None:
    vae, var, _ = states("var_transformer")
    torch.save(vae, tmp_path / "vae.pth")
    torch.save({**var, "head.weight": torch.zeros(30, 32), "head.bias": torch.zeros(30)}, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match="30 codes"):
        convert("var", [tmp_path / "vae.pth", tmp_path / "var.pth"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="--from var"):
        convert("llamagen", [tmp_path / "vae.pth", tmp_path / "var.pth"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_are_read_off_the_slots_or_taken_from_a_published_size() -> None:
    state = toy_var(scales=((1, 1), (3, 3)), heads=4).state_dict()
    levels = torch.tensor([[0] + [1] * 9])
    assert infer_var_config({**state, "lvl_1L": levels})["scales"] == ((1, 1), (3, 3))
    with pytest.raises(CheckpointError, match="scales are unknown"):
        infer_var_config(state)
    with pytest.raises(CheckpointError, match="not squares"):
        infer_var_config({**state, "lvl_1L": torch.tensor([[0, 0] + [1] * 8])})
    with pytest.raises(CheckpointError, match="head.weight missing"):
        infer_var_config({key: tensor for key, tensor in state.items() if key != "head.weight"})


def test_heads_without_normalised_attention_are_given_or_of_64_channels() -> None:
    state = toy_var(scales=((1, 1), (3, 3)), l2_attention=False).state_dict()
    state["lvl_1L"] = torch.tensor([[0] + [1] * 9])
    assert infer_var_config(state, heads=8)["heads"] == 8 and infer_var_config(state)["heads"] == 1


def test_unknown_arguments_and_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match="unknown model arguments patches"):
        var_config_from_release({"patches": 3, "patch_nums": [1]})
    assert set(transformer_from_var({"lvl_1L": torch.zeros(1), "stranger": torch.zeros(1)})) == {"stranger"}
