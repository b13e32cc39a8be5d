"""Pairs of noise and codes: the same whoever makes them, how often and in how many pieces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import arimg
from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.flow import FlowSolver
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR
from arimg.commands.data import command
from arimg.errors import ConfigError, InputError
from arimg.models.base import Condition
from arimg.pipeline import Pipeline
from arimg.train.pairs import MANIFEST, PairMaker, PairsConfig, PairSet, make_pairs, read_captions, weights_hash
from tests.toy import toy_folder, toy_pipeline, toy_text_encoder
from tests.toy_continuous import toy_continuous_pipeline
from tests.train.toy_emoji import write_toy_emoji

SETTINGS: dict[str, Any] = {"count": 7, "seed": 40, "guidance": Guidance(2.0), "sampling": Sampling(top_k=20),
                            "solver": FlowSolver(8), "batch": 2, "shard": 3}


@pytest.fixture(scope="module")
def teacher() -> Pipeline:
    return toy_pipeline()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_toy_emoji(tmp_path_factory.mktemp("data") / "emoji"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("controlled", [False, True])
def test_pairs_are_the_teachers_flow(teacher: Pipeline, data: str, tmp_path: Path, controlled: bool) -> None:
    config = PairsConfig(**SETTINGS, data=data if controlled else "")
    make_pairs(PairMaker(teacher, config), tmp_path)
    pairs = PairSet(tmp_path)
    assert len(pairs) == 7 and pairs.config == config and pairs.grid == (4, 4)
    assert pairs.teacher == weights_hash(teacher)
    rows = pairs.rows(np.arange(7))
    assert rows["seed"].tolist() == list(range(40, 47)) and bool((rows["picture"] >= 0).all()) == controlled
    numbers = np.array([5, 2])
    rows, inject = pairs.rows(numbers), None
    if controlled:
        maps = pairs.conditions.maps(numbers, rows["picture"], rows["type_id"])
        inject = teacher.control.inject(maps, type_ids_B=torch.from_numpy(rows["type_id"].astype(np.int64)))
        emoji = pairs.conditions.emoji
        assert emoji is not None and not emoji.held_out[rows["picture"] % len(emoji.images)].any()
        assert (emoji.labels[rows["picture"] % len(emoji.images)] == rows["class_id"]).all()
    space = teacher.tokenizer.space()
    request = DecodeRequest(Condition(class_ids_B=torch.from_numpy(rows["class_id"].astype(np.int64))), (4, 4),
                            torch.tensor([45, 42]), inject, config.guidance, config.sampling, space)
    codes = FlowAR(FlowSolver(8)).decode(Target(teacher.transformer, request), request).codes_BL
    assert codes is not None and codes.tolist() == rows["codes"].tolist()
    noise = pairs.noise(rows, space.codebook_VC)
    solved = FlowSolver(8).codes(noise[:, 0], Target(teacher.transformer, request).start()[:, 0].log(),
                                 space.codebook_VC)
    assert solved.tolist() == rows["codes"][:, 0].tolist(), "the noise is the one that the codes come from"


def test_pieces_and_parts_give_the_same_files(teacher: Pipeline, data: str, tmp_path: Path) -> None:
    maker = PairMaker(teacher, PairsConfig(**SETTINGS, data=data))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert make_pairs(maker, whole) > 0 and make_pairs(maker, whole) == 0
    for part in (1, 0):
        make_pairs(maker, parts, part, 2)
    assert contents(whole) == contents(parts)
    (whole / "pairs-00001.npy").unlink()
    with pytest.raises(InputError, match="1 of 3 shards are missing"):
        PairSet(whole)
    make_pairs(maker, whole)
    assert contents(whole) == contents(parts)


def test_captions_are_conditions(tmp_path: Path) -> None:
    teacher = toy_pipeline(conditioning="text", control=None, inject_layers=(), text=toy_text_encoder(12))
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n\n  a red dog on grass\n")
    config = PairsConfig(**SETTINGS, captions=str(file))
    make_pairs(PairMaker(teacher, config), tmp_path / "pairs")
    pairs = PairSet(tmp_path / "pairs")
    rows = pairs.rows(np.arange(7))
    assert pairs.conditions.captions == ["a cat", "a red dog on grass"] and set(rows["class_id"].tolist()) == {0, 1}
    assert (rows["picture"] == -1).all()
    condition = teacher.text([pairs.conditions.captions[line] for line in rows["class_id"]], 6)
    request = DecodeRequest(condition, (4, 4), torch.arange(40, 47), None, config.guidance, config.sampling,
                            teacher.tokenizer.space())
    codes = FlowAR(FlowSolver(8)).decode(Target(teacher.transformer, request), request).codes_BL
    assert codes is not None and codes.tolist() == rows["codes"].tolist()
    file.write_text("a dog\n")
    with pytest.raises(InputError, match="another teacher or configuration"):
        make_pairs(PairMaker(teacher, config), tmp_path / "pairs")


def test_a_folder_holds_one_set(teacher: Pipeline, tmp_path: Path) -> None:
    config = PairsConfig(**SETTINGS)
    make_pairs(PairMaker(teacher, config), tmp_path)
    for other in (PairMaker(teacher, replace(config, seed=1)),
                  PairMaker(toy_pipeline(num_classes=4, conditioning="class"), config)):
        with pytest.raises(InputError, match="another teacher or configuration"):
            make_pairs(other, tmp_path)


def test_refusals(teacher: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="count 0"):
        PairsConfig(count=0)
    for seed in (-1, 2 ** 63 - 6):
        with pytest.raises(ConfigError, match=f"seed {seed}"):
            PairsConfig(**{**SETTINGS, "seed": seed})
    with pytest.raises(InputError, match="captions"):
        PairMaker(toy_pipeline(conditioning="text"), PairsConfig(**SETTINGS))
    for kind in ("masked", "causal"):
        with pytest.raises(InputError, match="continuous tokens"):
            PairMaker(toy_continuous_pipeline(kind), PairsConfig(**SETTINGS))
    with pytest.raises(InputError, match="takes classes; leave the file out"):
        PairMaker(teacher, PairsConfig(**SETTINGS, captions=str(tmp_path / "none.txt")))
    for text, message in ((None, "cannot be read"), ("\n", "the file is empty")):
        if text is not None:
            (tmp_path / "none.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            read_captions(str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="part 3/2"):
        make_pairs(PairMaker(teacher, PairsConfig(**SETTINGS)), tmp_path, 2, 2)
    with pytest.raises(InputError, match="holds no pairs"):
        PairSet(tmp_path / "nowhere")


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"config": 3}', '{"config": {"count": 0}}'])
def test_damaged_folders(teacher: Pipeline, tmp_path: Path, manifest: str) -> None:
    make_pairs(PairMaker(teacher, PairsConfig(**{**SETTINGS, "count": 2})), tmp_path)
    shard = tmp_path / "pairs-00000.npy"
    whole = shard.read_bytes()
    for damaged in (whole[:-5], whole[:20], b""):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match="00000.npy: is damaged; delete it"):
            PairSet(tmp_path)
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(InputError, match=str(tmp_path)):
        PairSet(tmp_path)


def arguments(model: Path, out: Path, count: int = 5) -> list[str]:
    return ["--model", str(model), "-o", str(out), "--count", str(count), "--steps", "6", "--top-k", "9",
            "--device", "cpu"]


def test_command(tmp_path: Path) -> None:
    model, out = toy_folder(tmp_path / "model"), tmp_path / "pairs"
    done = CliRunner().invoke(command, ["pairs", *arguments(model, out)], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout == f"{out}\n" and "pairs per second" in done.stderr
    pairs = PairSet(out)
    assert pairs.config.guidance.cfg == 2 and pairs.config.sampling.top_k == 9 and (out / MANIFEST).exists()
    with pytest.raises(InputError, match="--part two"):
        CliRunner().invoke(command, ["pairs", *arguments(model, out), "--part", "two"], catch_exceptions=False)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_and_two_processes(tmp_path: Path) -> None:
    model = toy_folder(tmp_path / "model")
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))

    def start(out: Path, *more: str) -> subprocess.Popen:
        program = [sys.executable, "-m", "arimg", "data", "pairs", *arguments(model, out, 2100), *more]
        return subprocess.Popen(program, cwd=Path(arimg.__file__).parents[1], stdout=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert start(whole).wait() == 0
    process = start(killed)
    while process.poll() is None and not (killed / "pairs-00000.npy").exists():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(killed).wait() == 0
    assert [one.wait() for one in (start(shared, "--part", "1/2"), start(shared, "--part", "2/2"))] == [0, 0]
    complete = {name: data for name, data in contents(killed).items() if not name.endswith(".writing")}
    assert contents(whole) == complete == contents(shared) and len(complete) == 4
