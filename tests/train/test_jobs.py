"""Codes, maps and captions made ahead: sharded, resumable, and what training would have computed itself."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from arimg.checkpoints import find_model, load_component, save_component
from arimg.cli import main
from arimg.config import dump_config
from arimg.control.adapter import ControlConfig
from arimg.control.base import build
from arimg.data import to_images
from arimg.errors import ConfigError, InputError
from arimg.models.ar import ARConfig
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from arimg.train import jobs
from arimg.train.ar import ARObjective, ARRun
from arimg.train.caches import META, open_records, write_records
from arimg.train.captions import first_sentence
from arimg.train.codes import code_dtype
from arimg.train.control import ControlObjective, ControlRun
from arimg.train.data_config import CropConfig, DataConfig
from arimg.train.jobs import CaptionsJob, CodesJob, MapsJob, Part
from arimg.train.run import LoopConfig, OptimConfig
from arimg.train.shards import ShardSource
from arimg.train.throughput import Throughput, measure
from arimg.train.tokenizer import TokenizerRun
from tests.toy import toy_text_encoder
from tests.train.toy_sources import CLASSES, write_shards

SIZE = 16
MODEL = ARConfig(vocab_size=16, dim=16, layers=2, heads=2, ffn_hidden=32, block_size=64, num_classes=3,
                 inject_layers=(0, 1), caption_dim=12, caption_length=6)
ADAPTER = ControlConfig(embed_dim=8, depth=1, heads=2, ffn_hidden=16, patch=2, stride=2, dim=16, points=2,
                        types=("canny", "color"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    write_shards(folder / "shards", each=3)
    torch.manual_seed(0)
    save_component(VQTokenizer(VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1),
                                        res_blocks=1, z_channels=8)), folder / "tokenizer")
    return folder


@pytest.fixture
def data(root: Path, tmp_path: Path) -> Path:
    """Shards of this test alone."""
    return Path(shutil.copytree(root / "shards", tmp_path / "shards"))


def run(root: Path, data: Path, cls: Any = ARRun, crop: CropConfig = CropConfig("ten", SIZE, (1.25,)),
        **changes: Any) -> Any:
    settings: dict[str, Any] = {"objective": "ar" if cls is ARRun else "control", "name": "toy",
                                "tokenizer": str(root / "tokenizer"), "model": MODEL, "optim": OptimConfig(steps=1)}
    if cls is ControlRun:
        settings["control"] = ADAPTER
    return cls(**settings | changes, data=DataConfig("shards", str(data), batch_size=5, window=2, workers=2, crop=crop,
                                                     cache=str(data.parent / "cache")))


def live(config: Any) -> Any:
    return replace(config, data=replace(config.data, cache=""))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("crop", [CropConfig("ten", SIZE, (1.25, 1.5)), CropConfig("center", SIZE),
                                  CropConfig("random", SIZE, count=3)])
def test_cached_codes_are_those_of_the_crops(root: Path, data: Path, crop: CropConfig) -> None:
    config = run(root, data, crop=crop)
    (cache,) = CodesJob(config).run(Part())
    objective, source = ARObjective(config), ShardSource(data)
    tokenizer = load_component(root / "tokenizer", torch.float32)
    codes, _, class_ids, drop = objective.batch(2, 0)
    examples = objective.feed.batch(2, 0, (SIZE, SIZE))
    assert codes.shape == (5, 64) and class_ids.tolist() == [int(source.labels()[e.index]) for e in examples]
    assert all(example.pixels_HW3 is None for example in examples), "no picture is decoded"
    pixels = [objective.feed.crop(source.image(e.index), e.index, e.variant, (SIZE, SIZE)) for e in examples]
    with torch.no_grad():
        assert torch.equal(codes, tokenizer.encode(to_images(np.stack(pixels))).codes_BL)
    assert np.load(cache.path(cache.groups[0])).shape == (3, objective.feed.variants, 64)


def test_codes_on_the_fly_are_the_cached_ones(root: Path, data: Path) -> None:
    config = run(root, data)
    CodesJob(config).run(Part())
    cached, made = ARObjective(config), ARObjective(live(config))
    assert all(torch.equal(a, b) for a, b in zip(cached.batch(1, 0), made.batch(1, 0)))
    assert all(torch.equal(a, b) for a, b in zip(cached.held_out_batch, made.held_out_batch))


def test_parts_together_are_the_whole_and_nothing_is_made_twice(
        root: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(root, data)
    CodesJob(config).run(Part())
    folder = data.parent / "cache"
    whole = files(folder)
    shutil.rmtree(folder)
    for index in (2, 0, 1):
        CodesJob(config).run(Part(index, 3))
    assert files(folder) == whole
    (folder / next(name for name in whole if name.endswith("train-00.npy"))).unlink()
    made: list[int] = []
    write = CodesJob.write
    monkeypatch.setattr(CodesJob, "write", lambda self, cache, number, *rest: (
        made.append(number), write(self, cache, number, *rest)))
    CodesJob(config).run(Part())
    assert made == [0] and files(folder) == whole


def test_an_interrupted_job_leaves_whole_files_alone(root: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(root, data)
    calls: list[int] = []

    def save(stream: Any, codes: np.ndarray) -> None:
        calls.append(1)
        stream.write(b"half")
        if len(calls) == 2:
            raise KeyboardInterrupt
        stream.seek(0)
        np.lib.format.write_array(stream, codes)
    monkeypatch.setattr(jobs.np, "save", save)
    with pytest.raises(KeyboardInterrupt):
        CodesJob(config).run(Part())
    names = [name for name in files(data.parent / "cache") if not name.endswith(META)]
    assert [Path(name).name for name in names] == ["train-00.npy"]
    with pytest.raises(ConfigError, match="lacks 3 of 4 files, first train-01.npy; arimg data codes"):
        ARObjective(config)


def test_a_cache_of_something_else_is_refused(root: Path, data: Path, tmp_path: Path) -> None:
    config = run(root, data)
    with pytest.raises(ConfigError, match="holds no cache; make it with arimg data codes CONFIG.yaml"):
        ARObjective(config)
    CodesJob(config).run(Part(0, 4))
    torch.manual_seed(1)
    save_component(VQTokenizer(load_component(root / "tokenizer").config), tmp_path / "other")
    for attempt in (CodesJob, ARObjective):
        with pytest.raises(ConfigError, match="was made with tokenizer [0-9a-f]{16}, this run has [0-9a-f]{16}"):
            other = attempt(replace(config, tokenizer=str(tmp_path / "other")))
            other.run(Part())
    with pytest.raises(ConfigError, match="lacks 3 of 4 files"):
        ARObjective(config)
    with pytest.raises(ConfigError, match="data.cache='': caches are for folder and shards"):
        CodesJob(live(config))


@pytest.mark.parametrize("job", [CodesJob, CaptionsJob, lambda config: MapsJob(config, "canny")])
def test_nothing_is_made_ahead_of_runs_that_read_no_codes(data: Path, job: Any) -> None:
    config = TokenizerRun(objective="tokenizer", name="toy",
                          data=DataConfig("shards", str(data), crop=CropConfig(size=SIZE)))
    with pytest.raises(ConfigError, match="objective=tokenizer: its runs read nothing that is made ahead"):
        job(config)


def test_unreadable_samples_are_named_when_codes_are_made_and_replaced_in_training(
        root: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ShardSource(data)
    content = bytearray((data / "train-01.tar").read_bytes())
    for index in (3, 4):
        content[source.records[index]["image_at"]] ^= 255
    (data / "train-01.tar").write_bytes(content)
    config = run(root, data)
    job = CodesJob(config)
    with caplog.at_level(logging.WARNING, "arimg"):
        job.run(Part())
    assert job.skipped == 2 and "train-01.tar: 000003" in caplog.text and "train-01.tar: 000004" in caplog.text
    objective = ARObjective(config)
    seen = [objective.batch(step, 0)[0] for step in range(6)]
    assert max(int(codes.max()) for codes in seen) < 16 and objective.feed.loader.skipped > 0


def test_large_codebooks_get_more_bits() -> None:
    assert code_dtype(16384) is np.uint16 and code_dtype(65535) is np.uint16 and code_dtype(65536) is np.uint32


def test_cached_maps_are_those_of_the_extractor(root: Path, data: Path) -> None:
    config = run(root, data, ControlRun, maps="extracted", control_dropout=0.0)
    CodesJob(config).run(Part())
    for name in ADAPTER.types:
        MapsJob(config, name).run(Part(1, 2))
        MapsJob(config, name).run(Part(0, 2))
    extracted, cached = ControlObjective(config), ControlObjective(replace(config, maps="cached"))
    first, second = extracted.batch(3, 0), cached.batch(3, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    examples = cached.feed.batch(3, 0, (SIZE, SIZE))
    assert all(example.pixels_HW3 is None for example in examples)
    source, name = ShardSource(data), ADAPTER.types[examples[0].type_id]
    crop = cached.feed.crop(source.image(examples[0].index), examples[0].index, examples[0].variant, (SIZE, SIZE))
    assert np.array_equal(examples[0].map_HW3, np.asarray(build(name)(Image.fromarray(crop))))
    with pytest.raises(ConfigError, match="maps=cached: data.cache is empty"):
        ControlObjective(live(replace(config, maps="cached")))


def test_cached_captions_are_those_of_the_encoder(root: Path, data: Path, tmp_path: Path) -> None:
    encoder = toy_text_encoder(12)
    for part in (encoder.model, encoder.tokenizer):
        part.save_pretrained(tmp_path / "t5")
    model = replace(MODEL, conditioning="text")
    config = run(root, data, model=model, text_encoder=str(tmp_path / "t5"), short_captions=0.5)
    CodesJob(config).run(Part())
    CaptionsJob(config).run(Part())
    made, cached = ARObjective(config), ARObjective(replace(config, text_encoder=""))
    first, second = made.batch(1, 0), cached.batch(1, 0)
    assert first[2].shape == (5, 6, 12) and torch.equal(first[0], second[0])
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=2e-3)
    assert torch.equal(first[2] == 0, second[2] == 0) and bool((first[2] != 0).any())
    loss, _ = cached.network(*second)
    loss.backward()
    assert torch.isfinite(loss)
    with pytest.raises(ConfigError, match="text_encoder: is empty"):
        ARObjective(live(replace(config, text_encoder="")))


def test_first_sentences() -> None:
    assert first_sentence("A cat. On grass.") == "A cat." and first_sentence("No end") == "No end"
    assert first_sentence("Red 2.5 inch. More") == "Red 2.5 inch."


def test_records_of_any_length(tmp_path: Path) -> None:
    rows = [b"", b"abc", b"", b"x" * 70]
    write_records(tmp_path / "r.npy", rows)
    records = open_records(tmp_path / "r.npy")
    assert [records[i] for i in range(4)] == rows
    write_records(tmp_path / "none.npy", [b"", b""])
    assert open_records(tmp_path / "none.npy")[1] == b""
    (tmp_path / "r.npy").write_bytes((tmp_path / "r.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off"):
        open_records(tmp_path / "r.npy")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2"])
def test_parts_are_counted_from_one(text: str) -> None:
    with pytest.raises(InputError, match="give K/N with K from 1 to N"):
        Part.parse(text)
    assert Part.parse("4/4") == Part(3, 4)


def test_a_launcher_gives_every_process_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Part.of_process() == Part(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Part.of_process() == Part(2, 8)


def test_the_commands(root: Path, data: Path, tmp_path: Path) -> None:
    config = run(root, data, ControlRun, maps="cached")
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")

    def arimg(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(main, ["data", *arguments])
        assert result.exit_code == code, (result.stderr, result.exception)
        return result
    yaml = str(tmp_path / "run.yaml")
    result = arimg("index", str(data))
    assert result.stdout == f"{data / 'arimg-index.json'}\n" and "11 samples in 4 shards, 0 left out" in result.stderr
    for shard in ("1/2", "2/2"):
        folder = Path(arimg("codes", yaml, "--shard", shard).stdout.strip())
    assert len(list(folder.glob("train-*.npy"))) == 4 and json.loads((folder / META).read_text())["kind"] == "codes"
    for name in ADAPTER.types:
        arimg("maps", yaml, "--type", name)
    line = arimg("throughput", yaml, "data.batch_size=4", "--batches", "2").stdout
    assert line.startswith("the loader makes ") and " samples/s (data.workers=2), the model" in line
    assert "unknown control type 'cany'; did you mean canny" in arimg("maps", yaml, "--type", "cany", code=2).stderr
    assert CLASSES == tuple(ShardSource(data).class_names)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_throughput_is_measured_in_the_precision_of_the_run(root: Path, data: Path, precision: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arimg.train.throughput.training_precision", lambda name, device: name)
    config = live(run(root, data, train=LoopConfig(precision=precision)))
    objective, autocast = ARObjective(config), set()
    forward = objective.network.forward
    monkeypatch.setattr(objective.network, "forward", lambda *batch: (
        autocast.add(torch.is_autocast_enabled("cpu")), forward(*batch))[1])
    measure(config, objective, batches=1)
    assert autocast == {precision == "bf16"}


def test_the_loader_keeps_up_with_the_embedded_model(data: Path) -> None:
    """Shards of pictures, decoded for maps on the fly, codes from a cache; one training process of that size."""
    folder = find_model("emoji")
    transformer, control = (load_component(folder / name) for name in ("transformer", "control"))
    config = ControlRun(objective="control", name="toy", tokenizer=str(folder / "tokenizer"),
                        model=replace(transformer.config, num_classes=3), control=control.config,
                        data=DataConfig("shards", str(data), batch_size=4, crop=CropConfig("center", 128),
                                        cache=str(data.parent / "cache")))
    CodesJob(config).run(Part())
    found = measure(config, ControlObjective(config), batches=2)
    assert found.loader > found.model > 0
    assert found.line(config).endswith(f"{found.loader / found.model:.2f} times as many")
    slow = Throughput(loader=1.0, model=2.0).line(config)
    assert slow.endswith("0.50 times as many; raise data.workers, or cache codes and maps with arimg data")
