"""Two processes under torchrun compute what one process with twice the accumulation does, with DDP and with FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arimg
from arimg.errors import ConfigError
from arimg.registry import OBJECTIVES
from arimg.train.launch import load_run
from arimg.train.loop import Trainer
from tests.train.toy_runs import PATIENCE, RECIPES, SHARDED, inputs, read_log, run, weights, write_home

STEPS = 5
SETTINGS = (f"optim.steps={STEPS}", "train.save_steps=0", "train.validate_steps=5")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """Runs NAME-2x1 and NAME-sharded of two processes, NAME-1x2 and NAME-whole of one with twice the accumulation."""
    environment = {**os.environ, "ARIMG_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    for recipe in RECIPES:
        inputs(home, recipe)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "tests/train/two_processes.py", *SETTINGS], env=environment, text=True,
                          cwd=Path(arimg.__file__).parents[1], capture_output=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    for recipe in RECIPES:
        run(home, recipe, f"{recipe}-1x2", *SETTINGS, "train.accumulation=2")
    for recipe, settings in SHARDED.items():
        if settings:        # else it is what NAME-1x2 is
            run(home, recipe, f"{recipe}-whole", *SETTINGS, *settings, "train.accumulation=2")
    return home


def assert_same(home: Path, left: str, right: str) -> None:
    logs = read_log(home, left), read_log(home, right)
    assert [line["step"] for line in logs[0]] == [*range(1, STEPS + 1), STEPS], "each step, and a validation"
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert_same_weights(home, left, right)


def assert_same_weights(home: Path, left: str, right: str) -> None:
    arrays = weights(home, left), weights(home, right)
    assert arrays[0] and arrays[0].keys() == arrays[1].keys()
    for key, array in arrays[0].items():
        np.testing.assert_allclose(array, arrays[1][key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_every_objective_has_a_recipe(home: Path) -> None:
    given = {recipe: ["teacher=x", "data.folder=x", "init_from=x"] for recipe in RECIPES if recipe.startswith("dd")}
    assert set(OBJECTIVES.entries) == {
        load_run(home / f"{recipe}.yaml", ["name=x", *given.get(recipe, [])]).objective for recipe in RECIPES}


@pytest.mark.slow
def test_there_are_two_processes(trained: Path) -> None:
    assert [(trained / f"world-{rank}").read_text() for rank in range(2)] == ["2", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_equal_one_with_twice_the_accumulation(recipe: str, trained: Path) -> None:
    assert_same(trained, f"{recipe}-2x1", f"{recipe}-1x2")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHARDED)
def test_sharded_equals_whole(recipe: str, trained: Path) -> None:
    assert_same(trained, f"{recipe}-sharded", f"{recipe}-whole" if SHARDED[recipe] else f"{recipe}-1x2")


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_without_shards(trained: Path) -> None:
    """Checkpoints hold whole tensors: written by two processes with FSDP2, read by one."""
    checkpoint = trained / "runs" / "control-sharded" / "checkpoint-3"
    run(trained, "control", "control-unsharded", *SETTINGS, *SHARDED["control"], "train.accumulation=2",
        resume=str(checkpoint))
    assert_same_weights(trained, "control-unsharded", "control-sharded")


@pytest.mark.parametrize("recipe, settings, message", [
    ("tokenizer", ["train.sharding=fsdp2"], "no blocks to split"),
    ("tokenizer", ["train.checkpoint_blocks=true"], "no blocks to recompute"),
    ("ar", ["train.sharding=fsdp2"], "transformer.codebook_scale is a single number"),
    ("ar", ["train.sharding=fsdp2", "model.codebook_dim=null"], "needs several processes")])
def test_what_cannot_be_sharded(recipe: str, settings: list[str], message: str, home: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(home))
    config = load_run(home / f"{recipe}.yaml", ["name=refused", *settings])
    with pytest.raises(ConfigError, match=message):
        Trainer(config, OBJECTIVES.load(config.objective)(config))
