"""A run that is killed with SIGKILL and started again ends where an uninterrupted one ends: losses and weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import arimg
from arimg.train.launch import main
from tests.train.toy_emoji import write_toy_emoji

STEPS, EVERY, KILLED_AT = 24, 4, 6
COMMON = f"""
seed: 3
data: {{batch_size: 2}}
optim: {{steps: {STEPS}, warmup_steps: 2}}
train: {{log_steps: 1, save_steps: {EVERY}, threads: 1, ema_decay: 0.9}}
"""
TOKENIZER = "{codebook_size: 16, codebook_dim: 4, base_channels: 32, multipliers: [1, 1], res_blocks: 1, z_channels: 8}"
MODEL = ("{vocab_size: 16, dim: 16, layers: 2, heads: 2, ffn_hidden: 32, block_size: 64, num_classes: 2, "
         "rope_prefix: identity, rope_grid: 'true', inject_layers: [0, 1], codebook_dim: 4}")     # with its dropout
ADAPTER = ("{embed_dim: 8, depth: 1, heads: 2, ffn_hidden: 16, patch: 2, stride: 2, dim: 16, points: 2, "
           "types: [canny, softedge, lineart, color]}")
RECIPES = {
    "tokenizer": f"objective: tokenizer\ncrop: 8\nrevive_every: 3\nmodel: {TOKENIZER}\n",
    "ar": f"objective: ar\nmodel: {MODEL}\n",
    "control": f"objective: control\nmodel: {MODEL}\ncontrol: {ADAPTER}\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    write_toy_emoji(root / "data" / "emoji-128")
    for name, text in RECIPES.items():
        (root / f"{name}.yaml").write_text(text + COMMON)
    return root


@pytest.fixture(autouse=True)
def arimg_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(home))


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARIMG_HOME", str(home))
        return str(main(home / "tokenizer.yaml", ["name=first", "optim.steps=1"]) / "tokenizer")


def start(recipe: Path, overrides: list[str], home: Path) -> subprocess.Popen:
    environment = {**os.environ, "ARIMG_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "arimg.train", str(recipe), *overrides], env=environment,
                            cwd=Path(arimg.__file__).parents[1], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def read_log(run: Path) -> list[dict[str, float]]:
    """What was learnt at each step; how fast is not compared."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name != "images_per_second"} for line in lines]


def weights(export: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}.{key}": value.tobytes() for path in sorted(export.rglob("*.safetensors"))
            for key, value in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("objective", RECIPES)
def test_killed_and_resumed_equals_uninterrupted(objective: str, home: Path, tokenizer: str) -> None:
    recipe = home / f"{objective}.yaml"
    overrides = [] if objective == "tokenizer" else [f"tokenizer={tokenizer}"]
    straight, killed = (home / "runs" / f"{objective}-{kind}" for kind in ("straight", "killed"))

    process = start(recipe, [*overrides, f"name={killed.name}"], home)
    while process.poll() is None and len(read_log(killed)) < KILLED_AT:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "killed, not finished"
    done = len(read_log(killed))
    assert KILLED_AT <= done < STEPS and not (killed / "export").exists()
    assert (killed / f"checkpoint-{KILLED_AT // EVERY * EVERY}").is_dir() or done >= KILLED_AT + EVERY

    assert start(recipe, [*overrides, f"name={killed.name}"], home).wait() == 0
    main(recipe, [*overrides, f"name={straight.name}"])
    assert [entry["step"] for entry in read_log(killed)] == list(range(1, STEPS + 1))
    assert read_log(killed) == read_log(straight)
    assert weights(killed / "export") == weights(straight / "export")
