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
from arimg.train.ar import ARObjective
from arimg.train.launch import load_run
from arimg.train.loop import Trainer
from arimg.train.tokenizer import TokenizerObjective
from tests.train.toy_runs import PATIENCE, RECIPES, make_tokenizer, read_log, run, weights, write_home

STEPS = 5
UNTIED = "model.codebook_dim=null"       # FSDP2 splits no single numbers
SETTINGS = (f"optim.steps={STEPS}", "train.save_steps=0", "train.validate_steps=5")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_home(tmp_path_factory.mktemp("home"))
    make_tokenizer(root)
    return root


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """Runs NAME-2x1 and NAME-sharded of two processes, NAME-1x2 of one with twice the accumulation."""
    environment = {**os.environ, "ARIMG_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, "tests/train/two_processes.py", *SETTINGS], env=environment, text=True,
                          cwd=Path(arimg.__file__).parents[1], capture_output=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    for objective in RECIPES:
        run(home, objective, f"{objective}-1x2", *SETTINGS, "train.accumulation=2")
    for objective in ("ar", "control"):
        run(home, objective, f"{objective}-whole", *SETTINGS, UNTIED, "train.accumulation=2")
    return home


def assert_same(home: Path, left: str, right: str) -> None:
    logs = read_log(home, left), read_log(home, right)
    assert [line["step"] for line in logs[0]] == [*range(1, STEPS + 1), STEPS], "each step, and a validation"
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    arrays = weights(home, left), weights(home, right)
    assert arrays[0].keys() == arrays[1].keys()
    for key, array in arrays[0].items():
        np.testing.assert_allclose(array, arrays[1][key], rtol=1e-3, atol=2e-5, err_msg=key)


@pytest.mark.slow
def test_there_are_two_processes(trained: Path) -> None:
    assert [(trained / f"world-{rank}").read_text() for rank in range(2)] == ["2", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", RECIPES)
def test_two_processes_equal_one_with_twice_the_accumulation(objective: str, trained: Path) -> None:
    assert_same(trained, f"{objective}-2x1", f"{objective}-1x2")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "control"])
def test_sharded_equals_whole(objective: str, trained: Path) -> None:
    assert_same(trained, f"{objective}-sharded", f"{objective}-whole")


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_without_shards(trained: Path) -> None:
    """Checkpoints hold whole tensors: written by two processes with FSDP2, read by one."""
    checkpoint = trained / "runs" / "ar-sharded" / "checkpoint-3"
    run(trained, "ar", "ar-unsharded", *SETTINGS, UNTIED, "train.accumulation=2", resume=str(checkpoint))
    left, right = weights(trained, "ar-unsharded"), weights(trained, "ar-sharded")
    for key, array in left.items():
        np.testing.assert_allclose(array, right[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_what_cannot_be_sharded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(home))
    tokenizer = f"tokenizer={home / 'runs' / 'first' / 'export' / 'tokenizer'}"
    for objective, recipe, settings, message in (
            (TokenizerObjective, "tokenizer", ["train.sharding=fsdp2"], "no blocks to split"),
            (TokenizerObjective, "tokenizer", ["train.checkpoint_blocks=true"], "no blocks to recompute"),
            (ARObjective, "ar", [tokenizer, "train.sharding=fsdp2"], "transformer.codebook_scale is a single number"),
            (ARObjective, "ar", [tokenizer, UNTIED, "train.sharding=fsdp2"], "needs several processes")):
        config = load_run(home / f"{recipe}.yaml", ["name=refused", *settings])
        with pytest.raises(ConfigError, match=message):
            Trainer(config, objective(config))
