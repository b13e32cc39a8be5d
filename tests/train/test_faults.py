"""Checkpoints under faults: wherever a full disk or a kill strikes the writer, a whole checkpoint is left; what is
damaged or of another run is not resumed."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arimg.errors import ArimgError, CheckpointError, ConfigError, InputError
from arimg.tokenizers.vq import VQConfig
from arimg.train import checkpointing
from arimg.train.ar import ARRun
from arimg.train.checkpointing import find_latest, list_checkpoints, read_checkpoint, write_checkpoint
from arimg.train.data_config import CropConfig, DataConfig
from arimg.train.loop import Trainer
from arimg.train.resume import find_checkpoint, forget_log
from arimg.train.run import LoopConfig, OptimConfig
from arimg.train.tokenizer import TokenizerObjective, TokenizerRun
from tests.train.toy_emoji import write_toy_emoji

POINTS = 20


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes after it in the process reaches the disk."""


class Disk:
    """Counts everything that the writer does to the disk, and fails from the `fault`-th time on: "full" refuses what
    needs room, "kill" everything. A write that fails has written one half."""

    def __init__(self, kind: str, fault: int | None = None) -> None:
        self.kind, self.fault, self.count = kind, fault, 0

    def touch(self, needs_room: bool = True) -> None:
        self.count += 1
        if self.fault is None or self.count < self.fault:
            return
        if self.kind == "kill":
            raise Killed
        if needs_room:
            raise OSError(errno.ENOSPC, "No space left on device")

    def around(self, function: Callable[..., Any], needs_room: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.touch(needs_room)
            return function(*args, **kwargs)
        return call

    def open(self, path: Path) -> Any:
        self.touch()
        return _File(self, open(path, "wb", buffering=0))


class _File:
    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: memoryview) -> None:
        try:
            self.disk.touch()
        except BaseException:
            self.file.write(data[:len(data) // 2])
            raise
        self.file.write(data)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


@contextmanager
def on_disk(disk: Disk) -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "_open", disk.open)
        patch.setattr(checkpointing, "_sync", disk.around(checkpointing._sync, True))
        for module, name, needs_room in ((checkpointing.os, "makedirs", True), (checkpointing.os, "rename", False),
                                         (checkpointing.shutil, "rmtree", False)):
            patch.setattr(module, name, disk.around(getattr(module, name), needs_room))
        yield disk


def write(run: Path, step: int, keep: int = 1) -> None:
    parts = {name: {"tensor": torch.full((50,), float(step)), "step": step}
             for name in ("loop", "a.weights", "b.weights")}
    write_checkpoint(run, step, parts, {"config.yaml": f"step: {step}\n"}, keep)


def whole(run: Path) -> int:
    """The step of the newest whole checkpoint, all of whose parts are of that step."""
    found = find_latest(run)
    assert found is not None
    path, parts = found
    step = parts["loop"]["step"]
    assert path.name == f"checkpoint-{step}" and (path / "config.yaml").read_text() == f"step: {step}\n"
    assert sorted(parts) == ["a.weights", "b.weights", "loop"]
    assert all((part["tensor"] == step).all() for part in parts.values())
    return int(step)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> int:
    """What the writer does to the disk for one checkpoint that replaces another."""
    run = tmp_path_factory.mktemp("healthy")
    write(run, 4)
    with on_disk(Disk("full")) as disk:
        write(run, 8)
    assert whole(run) == 8 and [path.name for path in run.iterdir()] == ["checkpoint-8"]
    assert disk.count >= POINTS
    return disk.count


@pytest.mark.parametrize("kind", ["full", "kill"])
@pytest.mark.parametrize("point", range(POINTS))
def test_a_fault_leaves_a_whole_checkpoint(kind: str, point: int, operations: int, tmp_path: Path) -> None:
    fault = 1 + point * (operations - 1) // (POINTS - 1)
    write(tmp_path, 4)
    try:
        with on_disk(Disk(kind, fault)):
            write(tmp_path, 8)
    except CheckpointError as error:
        assert "No space left on device" in str(error) and "\n" not in str(error)
        assert f"checkpoint-{whole(tmp_path)} is whole" in str(error)
    except (Killed, RuntimeError):
        assert kind == "kill"
    else:
        assert kind == "full" and whole(tmp_path) == 8, "deleting needs no room"
    assert whole(tmp_path) in (4, 8)
    if whole(tmp_path) == 4:
        write(tmp_path, 8)      # the same command again, on a mended disk
    write(tmp_path, 12)
    assert whole(tmp_path) == 12 and [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("damage", [
    lambda path: (path / "a.weights.pt").write_bytes((path / "a.weights.pt").read_bytes()[:-1]),
    lambda path: (path / "a.weights.pt").write_bytes((path / "a.weights.pt").read_bytes()[:-1] + b"x"),
    lambda path: (path / "b.weights.pt").unlink(),
    lambda path: (path / "config.yaml").write_text("step: 9\n"),
    lambda path: (path / "manifest.json").unlink(),
    lambda path: (path / "manifest.json").write_text("{"),
])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage: Callable[[Path], None], tmp_path: Path,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 4, keep=2)
    write(tmp_path, 8, keep=2)
    damage(tmp_path / "checkpoint-8")
    assert whole(tmp_path) == 4
    assert len(caplog.records) == 1 and "checkpoint-8: is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(tmp_path / "checkpoint-8")


def test_nothing_whole_is_said_not_started_anew(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    write(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "loop.pt").unlink()
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole \(checkpoint-4\)"):
        find_latest(tmp_path)


def test_a_checkpoint_of_the_old_loop_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="earlier version.*name=NEW init_from=.*export"):
        find_latest(tmp_path)


def test_the_log_forgets_undone_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + "\n" + lines[0][:9])
    forget_log(path, 9)
    assert path.read_text().splitlines() == lines
    forget_log(path, 3)
    assert path.read_text().splitlines() == lines[:3]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizerRun:
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    write_toy_emoji(tmp_path / "data" / "emoji-128")
    model = VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1), res_blocks=1, z_channels=8)
    return TokenizerRun(objective="tokenizer", name="run", data=DataConfig(batch_size=2, crop=CropConfig("window", 8)),
                        optim=OptimConfig(steps=9), train=LoopConfig(log_steps=1), model=model)


def trainer(config: TokenizerRun, resume: str = "latest") -> Trainer:
    made = Trainer(config, TokenizerObjective(config))
    made.resume(resume)
    return made


def saved(config: TokenizerRun, *steps: int) -> Trainer:
    """A run that has saved after these steps."""
    made = trainer(config)
    for _ in range(max(steps)):
        made.train_step()
        if made.step in steps:
            made.save()
    return made


def test_a_full_disk_stops_the_run_with_one_line(config: TokenizerRun) -> None:
    run = saved(config, 1)
    run.train_step()
    with on_disk(Disk("full", 9)), pytest.raises(CheckpointError, match="No space left.*checkpoint-1 is whole"):
        run.save()
    assert trainer(config).step == 1


def test_a_checkpoint_tells_what_it_was_made_with(config: TokenizerRun) -> None:
    saved(config, 1)
    folder = config.folder() / "checkpoint-1"
    assert "codebook_size: 16" in (folder / "config.yaml").read_text()
    assert torch.__version__.startswith(json.loads((folder / "versions.json").read_text())["torch"])


def test_what_is_learnt_must_not_change(config: TokenizerRun) -> None:
    saved(config, 1)
    changes = {"seed": 1, "optim": replace(config.optim, lr=1e-4), "model": replace(config.model, codebook_size=32)}
    for key, value in changes.items():
        with pytest.raises(ConfigError, match=f"trained on something else: {key}.*was.*init_from") as caught:
            trainer(replace(config, **{key: value}))
        assert "\n" not in str(caught.value)
    same = replace(config, optim=replace(config.optim, steps=20), train=replace(config.train, keep=5, ema_decay=0.5))
    assert trainer(same).step == 1


def test_a_run_of_another_objective_is_not_resumed(config: TokenizerRun) -> None:
    saved(config, 1)
    with pytest.raises(ConfigError, match="was trained with objective=tokenizer, this run has ar; choose another name"):
        find_checkpoint("latest", ARRun(objective="ar", name=config.name, tokenizer="t"), 1)


def test_a_step_keeps_its_number_of_micro_batches(config: TokenizerRun) -> None:
    saved(config, 1)
    with pytest.raises(ConfigError, match="has 1 micro-batches a step, now processes x train.accumulation are 2"):
        trainer(replace(config, train=replace(config.train, accumulation=2)))


def test_going_back_never_leaves_later_checkpoints_to_be_resumed(config: TokenizerRun) -> None:
    saved(config, 1, 2)
    for source in ("none", str(config.folder() / "checkpoint-1")):
        with pytest.raises(CheckpointError, match="checkpoint-2: lies ahead"):
            trainer(config, source)
    assert trainer(config, str(config.folder() / "checkpoint-2")).step == 2


def test_damaged_checkpoints_make_way(config: TokenizerRun, caplog: pytest.LogCaptureFixture) -> None:
    saved(config, 1, 2)
    (config.folder() / "checkpoint-2" / "loop.pt").unlink()
    with caplog.at_level(logging.WARNING):
        run = trainer(config)
    assert run.step == 1 and "trying the one before" in caplog.text
    run.train_step()
    run.save()
    assert [path.name for path in list_checkpoints(config.folder())] == ["checkpoint-1", "checkpoint-2"]
    assert trainer(config).step == 2


def test_weights_come_back_when_showing_them_fails(config: TokenizerRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(config, 1)
    before = {name: tensor.clone() for name, tensor in run.first.module.state_dict().items()}

    def fail(*args: Any) -> None:
        raise OSError("no room for a picture")

    monkeypatch.setattr(run.objective, "sample", fail)
    with pytest.raises(InputError, match="no room for a picture"):
        run.export()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.first.module.state_dict().items())


def test_a_checkpoint_with_an_unknown_key_is_one_line(config: TokenizerRun) -> None:
    saved(config, 1)
    folder = config.folder() / "checkpoint-1"
    parts = read_checkpoint(folder)
    parts["tokenizer.weights"]["stranger"] = torch.zeros(1)
    write_checkpoint(config.folder(), 2, parts, {"config.yaml": (folder / "config.yaml").read_text()}, keep=2)
    with pytest.raises(ArimgError, match="unexpected: stranger"):
        trainer(config)
