"""Toy runs of every objective, in processes of their own that can be killed.

The processes are forked from a server that has imported everything, so that a run starts within a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from arimg.accel.flow import FlowSolver
from arimg.checkpoints import save_component
from arimg.pipeline import Pipeline
from arimg.registry import OBJECTIVES
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from arimg.train.pairs import PairMaker, PairsConfig, make_pairs
from tests.toy import toy_text_encoder
from tests.train.toy_emoji import write_toy_emoji
from tests.train.toy_sources import write_folder

STEPS, EVERY = 12, 3
PATIENCE = 900      # seconds that any wait may take on a busy machine
_COMMON = f"""
seed: 3
optim: {{steps: {STEPS}, warmup_steps: 2, lr: 2.0e-3}}
train: {{log_steps: 1, save_steps: {EVERY}, validate_steps: 4, threads: 1, ema_decay: 0.9, log_data: true}}
"""
_TOKENIZER = """
objective: tokenizer
revive_every: 3
data: {batch_size: 2, crop: {kind: window, size: 24}}
model: {codebook_size: 16, codebook_dim: 4, base_channels: 32, multipliers: [1, 1, 1], res_blocks: 1, z_channels: 8}
"""
_AR = """
tokenizer: HOME/vq
data: {batch_size: 2}
model: {vocab_size: 16, dim: 16, layers: 2, heads: 2, ffn_hidden: 32, block_size: 64, num_classes: 2,
        rope_prefix: identity, rope_grid: 'true', inject_layers: [0, 1], codebook_dim: 4}       # with its dropout
"""
_TEXT = """
objective: ar
tokenizer: HOME/vq
text_encoder: HOME/t5
short_captions: 0.5
data: {source: folder, folder: HOME/pictures, validation: HOME/pictures, batch_size: 2, crop: {kind: center, size: 32}}
model: {vocab_size: 16, dim: 16, layers: 2, heads: 2, ffn_hidden: 32, block_size: 64, conditioning: text,
        caption_dim: 12, caption_length: 6, rope_prefix: identity, rope_grid: 'true', codebook_dim: 4}
"""
_VAR = """
tokenizer: HOME/multiscale
data: {batch_size: 2}
model: {vocab_size: 16, codebook_dim: 4, scales: [[1, 1], [2, 2], [4, 4]], dim: 16, layers: 2, heads: 2, num_classes: 2,
        inject_layers: [0, 1]}
"""
_MAR = """
tokenizer: HOME/kl
data: {batch_size: 2}
model: {latent_channels: 2, grid: 4, encoder_dim: 16, encoder_layers: 1, encoder_heads: 2, decoder_dim: 16,
        decoder_layers: 2, decoder_heads: 2, buffer: 2, num_classes: 2, inject_encoder: [0], inject_decoder: [1],
        head: {width: 16, layers: 1, steps: ddim10}}
"""
_CAUSAL = """
tokenizer: HOME/kl
data: {batch_size: 2}
model: {latent_channels: 2, grid: 4, dim: 16, layers: 2, heads: 2, ffn_hidden: 32, num_classes: 2,
        inject_layers: [0, 1], head: {width: 16, layers: 1, steps: ddim10}}
"""
_PAIRS = "data: {batch_size: 2, held_out: 4}\n"
_CONTROL = "control: {embed_dim: 8, depth: 1, heads: 2, ffn_hidden: 16, dim: 16, points: 2, types: [canny, color]"
RECIPES = {     # name: what its YAML file says besides the above; every registered objective has one
    "tokenizer": _TOKENIZER,
    "adversary": f"{_TOKENIZER}loss: {{l1: 1.0, l2: 1.0, perceptual: 0.0, adversarial: 0.5, start_step: 2}}\n",
    "ar": f"objective: ar\n{_AR}",
    "text": _TEXT,
    "control": f"objective: control\n{_AR}{_CONTROL}, patch: 4, stride: 4}}\n",
    "var": f"objective: var\n{_VAR}",
    "var-control": f"objective: var-control\n{_VAR}{_CONTROL}, patch: 8, stride: 8}}\n",
    "mar": f"objective: mar\n{_MAR}",
    "mar-control": f"objective: mar-control\n{_MAR}{_CONTROL}, patch: 8, stride: 8}}\n",
    "causal": f"objective: causal\n{_CAUSAL}",
    "causal-control": f"objective: causal-control\n{_CAUSAL}{_CONTROL}, patch: 8, stride: 8}}\n",
    "dd1": f"objective: dd1\n{_PAIRS}timesteps: [0, 9]\nsplit: 40\n",
    "dd2-tuning": f"objective: dd2-tuning\n{_PAIRS}head_width: 8\nhead_depth: 1\ndraws: 2\nfit_steps: 3\n",
    "dd2": f"objective: dd2\n{_PAIRS}draws: 2\n"
           "turns: {updates: 2, align_at: 6, align_steps: 2, updates_after: 1}\n",
}
SHARDED = {     # recipe: what must be changed for FSDP2, which splits no single numbers
    "control": ("model.codebook_dim=null",), "var-control": (), "mar-control": (), "causal-control": ()}

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([
    "arimg.train.loop", "diffusers.optimization", "diffusers.training_utils", "tests.train.toy_runs",
    *sorted({target.partition(":")[0] for target in OBJECTIVES.entries.values()})])


def write_home(root: Path) -> Path:
    """A data set, tokenizers and the recipes, as $ARIMG_HOME of the runs below."""
    write_toy_emoji(root / "data" / "emoji-128", size=32)
    write_folder(root / "pictures")
    text = toy_text_encoder(12)
    text.model.save_pretrained(root / "t5")
    text.tokenizer.save_pretrained(root / "t5")
    convolutions: dict[str, Any] = {"base_channels": 32, "res_blocks": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_component(VQTokenizer(VQConfig(codebook_size=16, codebook_dim=4, multipliers=(1, 1, 1), z_channels=8,
                                            **convolutions)), root / "vq")
        save_component(MultiscaleTokenizer(MultiscaleConfig(
            codebook_size=16, codebook_dim=4, multipliers=(1,) * 4, scales=((1, 1), (2, 2), (4, 4)), phis=2,
            **convolutions)), root / "multiscale")
        save_component(KLTokenizer(KLConfig(multipliers=(1,) * 4, latent_channels=2, attention_levels=(),
                                            **convolutions)), root / "kl")
    for name, text in RECIPES.items():
        (root / f"{name}.yaml").write_text(text.replace("HOME", str(root)) + _COMMON)
    return root


def run(home: Path, recipe: str, name: str, *overrides: str, world: int = 1, resume: str = "latest") -> None:
    """Train to the end."""
    codes = finish(start(home, recipe, name, *overrides, world=world, resume=resume))
    assert codes == [0] * world, (home / "runs" / f"{name}.txt").read_text()[-3000:]


def inputs(home: Path, recipe: str) -> list[str]:
    """What names the things that Distilled Decoding builds on. They are made if they are not there: a teacher and pairs
    of noise and codes, a tuned network for the second stage."""
    teacher, tuned = home / "runs" / "teacher" / "export", home / "runs" / "tuned" / "export" / "tuned"
    if not recipe.startswith("dd"):
        return []
    if not teacher.exists():
        run(home, "control", "teacher", "optim.steps=1")
        config = PairsConfig(24, data=str(home / "data" / "emoji-128"), solver=FlowSolver(4), batch=8, shard=8)
        make_pairs(PairMaker(Pipeline.from_pretrained(teacher, "cpu", "float32"), config), home / "pairs")
    if recipe == "dd2" and not tuned.exists():
        run(home, "dd2-tuning", "tuned", "optim.steps=1")
    started = [f"init_from={tuned}"] if recipe == "dd2" else []
    return [f"teacher={teacher}", f"data.folder={home / 'pairs'}", *started]


def start(home: Path, recipe: str, name: str, *overrides: str, world: int = 1,
          resume: str = "latest") -> list[ForkServerProcess]:
    """The processes of a run, under way."""
    overrides = (*inputs(home, recipe), *overrides)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (home, (str(home / f"{recipe}.yaml"), f"name={name}", *overrides, "--resume", resume), name)
    processes = [_PROCESSES.Process(target=_train, args=(*arguments, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _train(home: Path, arguments: Sequence[str], name: str, rank: int, world: int, port: int) -> None:
    """One process of a run, in the environment that torchrun makes."""
    os.environ |= {"ARIMG_HOME": str(home), "OMP_NUM_THREADS": "1"}
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (home / "runs").mkdir(exist_ok=True)
    sys.stdout = sys.stderr = open(home / "runs" / f"{name}.txt", "a")
    os.dup2(sys.stderr.fileno(), 2)
    from arimg.cli import main

    main(["train", *arguments])


def finish(processes: list[ForkServerProcess]) -> list[int | None]:
    """Exit codes."""
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def stop_when(processes: list[ForkServerProcess], log: Path, lines: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to all processes as soon as the run has logged so many lines. It must not have ended before."""
    deadline = time.monotonic() + PATIENCE
    while len(read_lines(log)) < lines and time.monotonic() < deadline:
        assert all(process.is_alive() for process in processes), f"{log.parent.name} ended too early"
        time.sleep(0.001)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)


def read_lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def read_log(home: Path, name: str) -> list[dict[str, Any]]:
    """What was learnt, from which data, at each step; how fast is not compared."""
    lines = map(json.loads, read_lines(home / "runs" / name / "log.jsonl"))
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def weights(home: Path, name: str) -> dict[str, Any]:
    """Arrays of the exported networks, but the tokenizer that the run only used."""
    export = home / "runs" / name / "export"
    return {f"{path.parent.name}.{key}": value for path in sorted(export.rglob("*.safetensors"))
            for key, value in load_file(path).items()}
