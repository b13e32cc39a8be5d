"""Pipeline folders: what is written can be read, and every damage is one line that says where and what."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from arimg import checkpoints
from arimg.checkpoints import (CONFIG, INDEX, WEIGHTS, Index, PipelineSettings, find_model, list_models, load_component,
                               load_state, read_index, save_component, save_pipeline, staged_folder, write_index)
from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.errors import CheckpointError, UnknownNameError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.tokenizers.vq import VQConfig, VQTokenizer

SETTINGS = PipelineSettings(title="toy", class_names=("cat", "dog"), control_types=("canny",), size=(8, 12), cfg=2.0)


def toy_parts() -> dict[str, nn.Module]:
    return {
        "tokenizer": VQTokenizer(VQConfig(codebook_size=24, base_channels=32, multipliers=(1, 1), res_blocks=1,
                                          z_channels=8)),
        "transformer": ARTransformer(ARConfig(vocab_size=24, dim=32, layers=2, heads=2, ffn_hidden=64, block_size=16,
                                              num_classes=2, inject_layers=(0, 1))),
        "control": ControlAdapter(ControlConfig(embed_dim=16, depth=1, heads=2, ffn_hidden=32, patch=2, stride=2,
                                                dim=32, points=2)),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pipeline(tmp_path / "toy", toy_parts(), SETTINGS)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def message(call: object, *arguments: object, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)                                                        # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer", "transformer", "control"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_components_round_trip(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    module = toy_parts()[name]
    save_component(module, tmp_path / name, dtype)
    loaded = load_component(tmp_path / name)
    assert type(loaded) is type(module) and loaded.config == module.config and not loaded.training
    for key, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(dtype or tensor.dtype)), key


def test_text_model_and_tied_codebook_round_trip(tmp_path: Path) -> None:
    config = ARConfig(vocab_size=24, dim=32, layers=1, heads=2, ffn_hidden=64, block_size=16, conditioning="text",
                      caption_dim=8, caption_length=4, codebook_dim=8)
    module = ARTransformer(config)
    save_component(module, tmp_path / "t")
    loaded = load_component(tmp_path / "t", dtype=torch.float64)
    assert torch.equal(loaded.cls_embedding.uncond_embedding, module.cls_embedding.uncond_embedding.double())


def test_index_round_trips(folder: Path) -> None:
    index = read_index(folder)
    assert index == Index({"tokenizer": ("arimg.hub", "VQTokenizer"), "transformer": ("arimg.hub", "ARTransformer"),
                           "control": ("arimg.hub", "ControlAdapter")}, SETTINGS)
    assert index.settings.size == (8, 12)
    write_index(folder, replace(index, settings=replace(SETTINGS, cfg=1.5)))
    assert read_index(folder).settings.cfg == 1.5


def test_components_with_their_own_save_are_asked_to_save(tmp_path: Path) -> None:
    class Text:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{}")
    Text.__module__ = "transformers.models.t5"
    save_pipeline(tmp_path / "p", {"text_encoder": Text()}, SETTINGS)
    assert read_index(tmp_path / "p").components == {"text_encoder": ("transformers", "Text")}
    assert (tmp_path / "p/text_encoder/config.json").is_file()


def test_index_errors(folder: Path) -> None:
    edit_json(folder / INDEX, tokenizer=["os", "system"])
    assert "component 'tokenizer' wants code from 'os'; only arimg, diffusers, transformers are trusted" in message(
        read_index, folder)
    edit_json(folder / INDEX, tokenizer="VQTokenizer")
    assert "a component is [library, class]" in message(read_index, folder)
    edit_json(folder / INDEX, tokenizer=["arimg.hub", "VQTokenizer"], settings={"cfgg": 1})
    assert "settings: unknown key cfgg; did you mean cfg?" in message(read_index, folder)
    (folder / INDEX).write_text("{")
    assert "cannot be read as JSON" in message(read_index, folder)
    (folder / INDEX).write_text("[]")
    assert "holds list, not an object" in message(read_index, folder)


def test_config_errors(folder: Path) -> None:
    part = folder / "tokenizer"
    edit_json(part / CONFIG, codebok_size=3)
    assert "config.json: unknown key codebok_size; did you mean codebook_size?" in message(load_component, part)
    edit_json(part / CONFIG, _class_name="VQTokeniser")
    assert "unknown class 'VQTokeniser'; did you mean VQTokenizer or" in message(load_component, part)
    (part / CONFIG).write_text("{}")
    assert 'has no "_class_name"' in message(load_component, part)
    (part / CONFIG).unlink()
    assert "config.json: no such file; the folder is not complete" in message(load_component, part)
    edit_json(folder / "transformer" / CONFIG, heads=3)
    assert "dim 32 with 3 heads" in message(load_component, folder / "transformer")


@pytest.mark.parametrize(("part", "values", "why"), [
    ("transformer", {"heads": 0}, "heads=0: must be from 1 to"),
    ("transformer", {"vocab_size": -1}, "vocab_size=-1: must be from 1 to"),
    ("transformer", {"layers": 10 ** 9}, "layers=1000000000: must be from 1 to 1000"),
    ("tokenizer", {"multipliers": []}, "at least one level")])
def test_values_that_build_no_network_are_one_line(folder: Path, part: str, values: dict[str, object],
                                                   why: str) -> None:
    edit_json(folder / part / CONFIG, **values)
    assert why in message(load_component, folder / part)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_one_line(folder: Path, value: float) -> None:
    state = load_file(folder / "transformer" / WEIGHTS)
    state["norm.weight"][3] = value
    save_file(state, folder / "transformer" / WEIGHTS)
    assert "norm.weight hold NaN or infinity" in message(load_component, folder / "transformer")


def test_deeply_nested_json_and_integer_weights_are_one_line(folder: Path) -> None:
    state = load_file(folder / "transformer" / WEIGHTS)
    save_file({**state, "norm.weight": state["norm.weight"].long()}, folder / "transformer" / WEIGHTS)
    assert "norm.weight hold torch.int64 values" in message(load_component, folder / "transformer")
    (folder / INDEX).write_text("[" * 100_000)
    assert "cannot be read as JSON" in message(read_index, folder)


def test_unknown_underscore_keys_of_diffusers_are_ignored(folder: Path) -> None:
    edit_json(folder / "tokenizer" / CONFIG, _diffusers_version="9.9", _name_or_path="x")
    assert load_component(folder / "tokenizer").config.codebook_size == 24


def test_missing_extra_and_misshapen_keys_are_named(folder: Path) -> None:
    path = folder / "tokenizer" / WEIGHTS
    state = load_file(path)
    state["quant_conv.bias"] = torch.zeros(7)
    state["quant_conv.sias"] = torch.zeros(7)
    del state["decoder.conv_out.weight"]
    save_file(state, path)
    text = message(load_component, folder / "tokenizer")
    assert "1 missing: decoder.conv_out.weight" in text
    assert "1 unexpected: quant_conv.sias" in text
    assert "1 of another shape: quant_conv.bias (7,) instead of (8,)" in text
    save_file({}, path)
    text = message(load_component, folder / "tokenizer")
    assert text.count("encoder.") == 20 and ", ...; the weights and the config belong to different models" in text


def test_damaged_weights(folder: Path) -> None:
    path = folder / "tokenizer" / WEIGHTS
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        assert "is damaged or not a safetensors file" in message(load_component, folder / "tokenizer")
    path.unlink()
    assert f"has no weights; expected {WEIGHTS}" in message(load_component, folder / "tokenizer")


def test_sharded_weights(folder: Path) -> None:
    part = folder / "transformer"
    state = load_file(part / WEIGHTS)
    (part / WEIGHTS).unlink()
    keys = sorted(state)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({key: state[key] for key in keys if names[key] == name}, part / name)
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    loaded = load_component(part).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in keys)
    (part / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: no such file" in message(load_component, part)
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    assert "lies outside the folder" in message(load_component, part)
    (part / "model.safetensors.index.json").write_text("{}")
    assert 'has no "weight_map"' in message(load_component, part)


def test_tensors_that_no_checkpoint_holds_are_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.register_buffer("table", torch.arange(3), persistent=False)
    state = nn.Linear(2, 2).state_dict()
    assert "Linear keeps tensors outside its state dict (table)" in message(load_state, module, state, "x")


def test_models_are_found_by_name_and_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "assets").mkdir(parents=True)
    folder.rename(package / "assets" / "emoji")
    monkeypatch.setattr(checkpoints, "files", lambda name: package)
    model, = list_models()
    assert (model.name, model.settings.title, model.settings.control_types) == ("emoji", "toy", ("canny",))
    assert model.bytes > 1000
    assert find_model("emoji") == find_model(package / "assets/emoji") == package / "assets/emoji"
    assert "unknown model 'emojy'; did you mean emoji?" in message(find_model, "emojy", kind=UnknownNameError)
    assert "no such folder; give a pipeline folder, a hub id owner/name or one of emoji" in message(find_model, "./x/y")
    assert f"has no {INDEX}" in message(find_model, str(tmp_path))
    (tmp_path / "vq.pt").touch()
    assert "is a file, not a pipeline folder" in message(find_model, str(tmp_path / "vq.pt"))


def test_hub_ids_without_a_network_are_one_line() -> None:
    text = message(find_model, "nobody/no-such-model", None, True)
    assert text.startswith("nobody/no-such-model: no such folder here, and the hub did not give it")


def test_hub_ids_are_downloaded_without_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    seen = {}

    def download(repo: str, **options: object) -> str:
        seen.update(options, repo=repo)
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("some/model", revision="v1") == folder
    assert seen["repo"] == "some/model" and seen["revision"] == "v1"
    pickles = ("loader.py", "transformer/pytorch_model.bin", "tokenizer/weights.pt")
    assert not any(fnmatch(name, pattern) for name in pickles for pattern in seen["allow_patterns"])


def test_saving_replaces_pipelines_only(folder: Path, tmp_path: Path) -> None:
    save_pipeline(folder, toy_parts(), replace(SETTINGS, title="second"))
    assert read_index(folder).settings.title == "second"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")
    assert f"exists and holds no {INDEX}" in message(save_pipeline, tmp_path / "mine", toy_parts(), SETTINGS)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    (tmp_path / "file").write_text("x")
    assert "is not replaced" in message(save_pipeline, tmp_path / "file", toy_parts(), SETTINGS)
    assert "cannot be written" in message(save_pipeline, tmp_path / "file/below", toy_parts(), SETTINGS)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_half_written_stays(folder: Path, tmp_path: Path, fault: BaseException) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
        with staged_folder(folder, INDEX) as stage:
            (stage / "half").write_text("x")
            raise fault
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert read_index(folder).settings == SETTINGS
    if isinstance(fault, OSError):
        assert "cannot be written (No space left on device)" in str(caught.value)
