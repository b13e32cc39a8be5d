"""A run that is killed with SIGKILL, twice, and started again ends where an uninterrupted one ends: the same data and
losses at every step, the same weights; on one process and on two."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.train.toy_runs import (EVERY, RECIPES, STEPS, finish, read_lines, read_log, run, start, stop_when, weights,
                                  write_home)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def kill(home: Path, objective: str, name: str, steps: int, world: int) -> None:
    """Start or resume the run and kill it once it has logged `steps` lines."""
    processes = start(home, objective, name, world=world)
    stop_when(processes, home / "runs" / name / "log.jsonl", steps)
    assert finish(processes) == [-signal.SIGKILL] * world, "killed, not finished"
    assert not (home / "runs" / name / "export").exists()


def assert_killed_equals_straight(home: Path, objective: str, world: int, kills: tuple[int, ...]) -> None:
    straight, killed = (f"{objective}-{world}-{kind}-{len(kills)}" for kind in ("straight", "killed"))
    run(home, objective, straight, world=world)
    for steps in kills:
        kill(home, objective, killed, steps, world)
    run(home, objective, killed, world=world)
    log = read_log(home, killed)
    assert [line["step"] for line in log if "data" in line] == list(range(1, STEPS + 1))
    assert len({line["data"] for line in log if "data" in line}) == STEPS, "every step has data of its own"
    assert log == read_log(home, straight)
    left, right = weights(home, killed), weights(home, straight)
    assert left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)
    assert "resumed" in (home / "runs" / f"{killed}.txt").read_text()


def test_killed_and_resumed_equals_uninterrupted(home: Path) -> None:
    assert_killed_equals_straight(home, "ar", 1, kills=(STEPS // 2,))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("objective", RECIPES)
def test_two_kills(objective: str, world: int, home: Path) -> None:
    assert_killed_equals_straight(home, objective, world, kills=(STEPS // 2, STEPS // 2 + 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_so_in_one_line(number: signal.Signals, home: Path) -> None:
    name = f"stopped-{number.name}"
    processes = start(home, "ar", name, "train.save_steps=0", "optim.steps=2000")
    stop_when(processes, home / "runs" / name / "log.jsonl", EVERY, number)
    assert finish(processes) == [128 + number]
    done = read_log(home, name)[-1]["step"]
    assert (home / "runs" / name / f"checkpoint-{done}").is_dir()
    said = [line for line in read_lines(home / "runs" / f"{name}.txt") if "arimg:" in line]
    assert len(said) == 1 and f"stopped by a signal at step {done}, with a checkpoint" in said[0]
