"""Original files laid out as published, at toy size, through `convert` and `Pipeline` to the original's own tokens."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arimg.checkpoints import read_index
from arimg.errors import ArimgError, CheckpointError, InputError, UnknownNameError
from arimg.interop.convert import convert
from arimg.interop.vq import infer_vq_config
from arimg.pipeline import Pipeline
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from tests.toy import toy_text_encoder

FIXTURES = Path(__file__).parents[1] / "data/parity"
VQ = VQConfig(codebook_size=96, base_channels=32, multipliers=(1, 1, 1, 1, 1), res_blocks=1, z_channels=8)   # stride 16

TRANSFORMERS = ("llamagen_gpt_c2i", "controlar_c2i")


def fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The original state dict, and inputs and outputs."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    state = {key[3:]: tensor for key, tensor in tensors.items() if key.startswith("sd.")}
    return state, {key: tensor for key, tensor in tensors.items() if not key.startswith("sd.")}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def vq_file(tmp_path: Path) -> Path:
    """A tokenizer file as LlamaGen's trainer writes it."""
    state = {**VQTokenizer(VQ).state_dict(), "quantize.codebook_used": torch.zeros(65536)}
    return saved(tmp_path / "vq_ds16_c2i.pt", {"model": state, "steps": 7, "args": argparse.Namespace(lr=1e-4)})


def opened(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu", dtype="float32")


def refusal(*arguments: Any, kind: type[ArimgError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(*arguments, **options)
    out = Path(arguments[2])
    assert not out.exists() and not list(out.parent.glob(f".{out.name}.*")), "something half-written stays"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def wrapped(kind: str, path: Path, state: dict[str, Tensor]) -> Path:
    """The layouts in which transformers are published."""
    if kind == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    content = {"model": {"model": state, "steps": 3, "args": argparse.Namespace(gpt_model="GPT-B")},
               "module": {"module": {**state, "freqs_cis": torch.zeros(3)}, "ds_version": "0.9"},
               "compiled": {"model": {f"_orig_mod.{key}": tensor for key, tensor in state.items()}},
               "ema": {"model": {key: tensor + 1 for key, tensor in state.items()}, "ema": state},
               "bare": state}
    return saved(path, content[kind])


@pytest.mark.parametrize("layout", ["model", "module", "compiled", "ema", "bare", "safetensors"])
def test_llamagen_class_conditional_gives_the_fixture_tokens(tmp_path: Path, vq_file: Path, layout: str) -> None:
    state, io = fixture("llamagen_gpt_c2i")
    path = wrapped(layout, tmp_path / "c2i.pt", state)
    notices: list[str] = []
    out = convert("llamagen", [path, vq_file], tmp_path / "out", heads=4, image_size=64,
                  weights="ema" if layout == "ema" else "model", notify=notices.append)
    pipe = opened(out)
    assert any("quantize.codebook_used" in line for line in notices)
    assert any("freqs_cis" in line for line in notices) == (layout == "module")
    for run, cfg, interval in (("cfg", 3.0, (0, None)), ("nocfg", 1.0, (0, None)), ("cfg_interval", 3.0, (0, 6))):
        result = pipe(class_id=io["in.class_ids"].tolist(), cfg=cfg, cfg_interval=interval, top_k=1)
        assert torch.equal(result.codes, io[f"out.greedy_tokens_{run}"].long()), run
    assert result.images[0].size == (64, 64)


def test_llamagen_text_conditional_gives_the_fixture_tokens(tmp_path: Path, vq_file: Path) -> None:
    state, io = fixture("llamagen_gpt_t2i")
    notices: list[str] = []
    out = convert("llamagen", [vq_file, saved(tmp_path / "t2i.pt", {"model": state})], tmp_path / "out", heads=4,
                  image_size=64, notify=notices.append)
    assert "--text-encoder" in notices[-1]
    pipe = opened(out)
    masked = {"prompt_embeds": io["in.caption"], "prompt_attention_mask": io["in.emb_mask"]}
    for run, cfg in (("cfg", 4.0), ("nocfg", 1.0)):
        assert torch.equal(pipe(**masked, cfg=cfg, temperature=0).codes, io[f"out.greedy_tokens_{run}"].long()), run


@pytest.mark.parametrize("layout", ["model", "safetensors"])
def test_controlar_class_conditional_gives_the_fixture_tokens(tmp_path: Path, vq_file: Path, layout: str) -> None:
    state, io = fixture("controlar_c2i")
    notices: list[str] = []
    out = convert("controlar", [vq_file, wrapped(layout, tmp_path / "canny.pt", state)], tmp_path / "out", heads=3,
                  encoder_heads=2, notify=notices.append)
    assert any("condition_embeddings.weight" in line and "without effect" in line for line in notices)
    pipe = opened(out)
    assert pipe.settings.size == (64, 64) and pipe.control_types == ("canny",)
    classes = io["in.class_ids"].tolist()
    for run, control, cfg in (("cfg", "in.control", 3.0), ("nocfg", "in.control", 1.0),
                              ("cfg_other_control", "in.control_smooth", 3.0)):
        codes = pipe(io[control], class_id=classes, cfg=cfg, top_k=1).codes
        assert torch.equal(codes, io[f"out.greedy_tokens_{run}"].long()), run


def test_controlar_text_conditional_gives_the_fixture_tokens(tmp_path: Path, vq_file: Path) -> None:
    state, io = fixture("controlar_t2i")
    out = convert("controlar", [saved(tmp_path / "canny.pt", {"model": state}), vq_file], tmp_path / "out", heads=3,
                  encoder_heads=2)
    pipe = opened(out)
    given = {"prompt_embeds": io["in.caption"], "prompt_attention_mask": io["in.emb_mask"], "top_k": 1}
    for run, cfg, scale in (("cfg", 4.0, 1.0), ("nocfg", 1.0, 1.0), ("cfg_strength", 4.0, 0.6)):
        codes = pipe(io["in.control"], cfg=cfg, control_scale=scale, **given).codes
        assert torch.equal(codes, io[f"out.greedy_tokens_{run}"].long()), run


def test_controlar_for_several_sizes_takes_its_table_from_the_file(tmp_path: Path, vq_file: Path) -> None:
    state, io = fixture("controlar_t2i_multires")
    out = convert("controlar", [vq_file, saved(tmp_path / "MR.pt", state)], tmp_path / "out", heads=3, encoder_heads=2,
                  image_size=64)
    pipe = opened(out)
    assert pipe.transformer.config.block_size == 36 and pipe.settings.size == (64, 64)
    for height, width in ((64, 112), (80, 48)):
        name = f"{height}x{width}"
        codes = pipe(io[f"in.{name}_control"], prompt_embeds=io["in.caption"], prompt_attention_mask=io["in.emb_mask"],
                     size=(height, width), cfg=3.0, top_k=1).codes
        assert torch.equal(codes, io[f"out.greedy_tokens_{name}_cfg"].long()), name


def test_tokenizer_fixture_config_is_read_off_its_shapes() -> None:
    state, _ = fixture("llamagen_vq")
    config = json.loads((FIXTURES / "llamagen_vq.json").read_text())["config"]
    assert infer_vq_config(state) == VQConfig(
        codebook_size=config["codebook_size"], codebook_dim=config["codebook_embed_dim"],
        base_channels=config["base_channels"], multipliers=tuple(config["encoder_ch_mult"]),
        res_blocks=config["num_res_blocks"], z_channels=config["z_channels"], in_channels=config["in_channels"])
    uneven = VQConfig(base_channels=32, multipliers=(1, 2, 4), decoder_multipliers=(1, 1, 3), z_channels=8)
    assert infer_vq_config(VQTokenizer(uneven).state_dict()) == uneven
    del state["encoder.conv_in.weight"]
    with pytest.raises(CheckpointError, match="encoder.conv_in.weight missing"):
        infer_vq_config(state)


def test_bfloat16_and_settings(tmp_path: Path, vq_file: Path) -> None:
    state, _ = fixture("llamagen_gpt_c2i")
    names = [f"class {i}" for i in range(10)]
    out = convert("llamagen", [vq_file, saved(tmp_path / "c2i.pt", state)], tmp_path / "out", heads=4, image_size=64,
                  class_names=names, dtype=torch.bfloat16)
    assert load_file(out / "transformer/diffusion_pytorch_model.safetensors")["norm.weight"].dtype == torch.bfloat16
    settings = read_index(out).settings
    assert settings.class_names == tuple(names) and settings.licence == "MIT" and settings.cfg == 4.0


def test_image_size_is_asked_for_known_or_announced(tmp_path: Path, vq_file: Path) -> None:
    state, _ = fixture("llamagen_gpt_c2i")
    notices: list[str] = []
    convert("llamagen", [vq_file, saved(tmp_path / "mine.pt", state)], tmp_path / "a", heads=4, notify=notices.append)
    assert read_index(tmp_path / "a").settings.size == (256, 256)
    assert "taken to be 256 pixels, --image-size sets another" in notices[-1]
    convert("llamagen", [vq_file, saved(tmp_path / "c2i_B_384.pt", state)], tmp_path / "b", heads=4)
    assert read_index(tmp_path / "b").settings.size == (384, 384)


def hf_encoder(naming: int) -> dict[str, Tensor]:
    """The bare ViT inside the ControlAR fixture, in the key naming of transformers 4 or 5."""
    state, _ = fixture("controlar_c2i")
    start = "adapter.model."
    bare = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
    if naming == 5:
        names = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
                 "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
                 "intermediate.dense": "mlp.fc1", ".output.dense": ".mlp.fc2", "encoder.layer.": "layers."}
        for old, new in names.items():
            bare = {key.replace(old, new): tensor for key, tensor in bare.items()}
    return bare


@pytest.mark.parametrize("naming", [4, 5])
def test_a_bare_encoder_starts_a_new_control(tmp_path: Path, vq_file: Path, naming: int) -> None:
    state, io = fixture("llamagen_gpt_c2i")
    save_file(hf_encoder(naming), tmp_path / "model.safetensors")
    notices: list[str] = []
    out = convert("controlar", [vq_file, saved(tmp_path / "c2i.pt", state), tmp_path / "model.safetensors"],
                  tmp_path / "out", heads=4, encoder_heads=2, image_size=64, control_types=("hed",),
                  notify=notices.append)
    assert any("pooler.dense.weight" in line for line in notices) and "before it is trained" in notices[-1]
    pipe = opened(out)
    assert torch.equal(pipe.control.encoder.vit.norm.weight, hf_encoder(4)["layernorm.weight"])
    assert pipe.control_types == ("hed",)
    codes = pipe(torch.rand(3, 64, 64), class_id=io["in.class_ids"].tolist(), cfg=3.0, top_k=1).codes
    assert torch.equal(codes, io["out.greedy_tokens_cfg"].long()), "a new control must change nothing"


def test_text_encoder_is_copied_into_the_folder(tmp_path: Path, vq_file: Path) -> None:
    pytest.importorskip("transformers")
    text = toy_text_encoder(width=40)
    for part in (text.model, text.tokenizer):
        part.save_pretrained(tmp_path / "t5")
    state, _ = fixture("llamagen_gpt_t2i")
    files = [vq_file, saved(tmp_path / "t2i.pt", state)]
    out = convert("llamagen", files, tmp_path / "out", heads=4, image_size=64, text_encoder=tmp_path / "t5")
    assert opened(out)(prompt="a cat").codes.shape == (1, 16)
    narrow = {"cls_embedding.uncond_embedding": torch.zeros(120, 32),
              "cls_embedding.cap_proj.fc1.weight": torch.zeros(64, 32)}
    files = [vq_file, saved(tmp_path / "narrow.pt", {**state, **narrow})]
    assert "gives features of width 40, the model reads 32" in refusal(
        "llamagen", files, tmp_path / "no", heads=4, image_size=64, text_encoder=tmp_path / "t5")


def test_key_faults_are_named(tmp_path: Path, vq_file: Path) -> None:
    state, _ = fixture("llamagen_gpt_c2i")
    out, options = tmp_path / "out", {"heads": 4, "image_size": 64}

    def attempt(content: dict[str, Tensor]) -> str:
        return refusal("llamagen", [vq_file, saved(tmp_path / "c2i.pt", content)], out, **options)
    assert "1 missing: norm.weight" in attempt({key: state[key] for key in state if key != "norm.weight"})
    assert "1 unexpected: layers.0.extra" in attempt({**state, "layers.0.extra": torch.ones(1)})
    assert "norm.weight (3,) instead of (64,)" in attempt({**state, "norm.weight": torch.ones(3)})
    broken = {**VQTokenizer(VQ).state_dict(), "encoder.conv_on.weight": torch.ones(2)}
    files = [saved(tmp_path / "vq.pt", broken), saved(tmp_path / "c2i.pt", state)]
    assert "vq.pt: keys do not fit VQTokenizer: 1 unexpected: encoder.conv_on.weight" in refusal(
        "llamagen", files, out, **options)
    controlled, _ = fixture("controlar_c2i")
    del controlled["adapter.model.encoder.layer.1.attention.output.dense.weight"]
    assert "1 missing: encoder.vit.blocks.1.attn.proj.weight" in refusal(
        "controlar", [vq_file, saved(tmp_path / "canny.pt", controlled)], out, heads=3, encoder_heads=2)


def test_files_that_do_not_belong_together(tmp_path: Path, vq_file: Path) -> None:
    plain, controlled = (saved(tmp_path / f"{name}.pt", fixture(name)[0]) for name in TRANSFORMERS)
    encoder = tmp_path / "vit.safetensors"
    save_file(hf_encoder(4), encoder)
    strange = saved(tmp_path / "unet.pt", {"down.weight": torch.ones(2)})
    small = saved(tmp_path / "small.pt", VQTokenizer(VQConfig(codebook_size=8, base_channels=32, multipliers=(1, 1),
                                                              res_blocks=1, z_channels=8)).state_dict())
    out = tmp_path / "out"
    assert "no tokenizer there" in refusal("llamagen", [plain], out)
    assert "no transformer there" in refusal("llamagen", [vq_file], out)
    assert "no files: no tokenizer there" in refusal("llamagen", [], out)
    assert "a second tokenizer beside" in refusal("llamagen", [vq_file, vq_file], out)
    assert "neither of student, tokenizer, transformer, encoder; its keys begin with down.weight" in refusal(
        "llamagen", [vq_file, strange], out)
    assert "convert it with --from controlar" in refusal("llamagen", [vq_file, controlled], out)
    assert "LlamaGen has no control encoder" in refusal("llamagen", [vq_file, plain, encoder], out)
    assert "holds no ControlAR weights" in refusal("controlar", [vq_file, plain], out, image_size=64)
    assert "brings its own trained encoder" in refusal("controlar", [vq_file, controlled, encoder], out)
    assert "the transformer knows 96 codes, the tokenizer 8" in refusal("llamagen", [small, plain], out, heads=4)
    assert "no EMA weights there" in refusal("llamagen", [vq_file, plain], out, weights="ema")


def test_option_errors(tmp_path: Path, vq_file: Path) -> None:
    plain, controlled = (saved(tmp_path / f"{name}.pt", fixture(name)[0]) for name in TRANSFORMERS)
    out, files = tmp_path / "out", [vq_file, plain]
    assert "unknown kind of original weights 'llamgen'; did you mean llamagen" in refusal(
        "llamgen", files, out, kind=UnknownNameError)
    assert "unknown preset 'XXLL'; did you mean XXL" in refusal(
        "llamagen", files, out, preset="XXLL", kind=UnknownNameError)
    assert "give it with --heads" in refusal("llamagen", files, out)
    assert "must be a multiple of 16; the nearest is 64" in refusal(
        "llamagen", files, out, image_size=70, kind=InputError)
    assert "2 class names for 10 classes" in refusal(
        "llamagen", files, out, heads=4, class_names=["a", "b"], kind=InputError)
    assert "this model takes classes, not captions" in refusal(
        "llamagen", files, out, heads=4, text_encoder="t5", kind=InputError)
    assert "the rotary table of this file ends at 64" in refusal(
        "controlar", [vq_file, controlled], out, heads=3, encoder_heads=2, image_size=128, kind=InputError)
    assert "unknown control type 'cany'; did you mean canny" in refusal(
        "controlar", files, out, control_types=("cany",), kind=UnknownNameError)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_damaged_and_malicious_files(tmp_path: Path, vq_file: Path) -> None:
    state, _ = fixture("llamagen_gpt_c2i")
    whole = saved(tmp_path / "c2i.pt", {"model": state}).read_bytes()
    marker, out = tmp_path / "ran", tmp_path / "out"
    evil = saved(tmp_path / "evil.pt", {"model": state, "args": Payload(marker)})
    assert "runs code: it asks for posix.system" in refusal("llamagen", [vq_file, evil], out, heads=4)
    assert not marker.exists()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    assert "cut.pt: is damaged" in refusal("llamagen", [vq_file, tmp_path / "cut.pt"], out, heads=4)
    assert "none.pt: no such file" in refusal("llamagen", [vq_file, tmp_path / "none.pt"], out, heads=4)


def test_an_existing_folder_of_something_else_is_kept(tmp_path: Path, vq_file: Path) -> None:
    plain = saved(tmp_path / "c2i.pt", fixture("llamagen_gpt_c2i")[0])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is not replaced"):
        convert("llamagen", [vq_file, plain], tmp_path / "photos", heads=4, image_size=64)
    assert (tmp_path / "photos/me.txt").is_file()
