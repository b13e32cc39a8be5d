"""The one training loop. An objective supplies the network, the batch of a step and what to show; the rest is here.

Batches are functions of (seed, step), so a resumed run sees exactly the data that an uninterrupted one would.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from arimg.errors import ConfigError
from arimg.train.run import OptimConfig, RunConfig

_log = logging.getLogger("arimg")


class Objective(Protocol):
    """What is trained. `network(*batch)` returns the loss and figures to log."""

    network: nn.Module

    def batch(self, step: int, rank: int, processes: int) -> tuple[Tensor, ...]:
        """The inputs of `network` for this step on this process, a function of (seed, step, rank) alone."""

    def after_step(self, step: int, network: nn.Module) -> dict[str, float]:
        """Work outside the gradient, such as dead-code revival; returns figures to log."""

    def state_dict(self) -> dict[str, Any]:
        """What `after_step` remembers between steps."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""

    def sample(self, network: nn.Module) -> Image.Image:
        """A picture of how far the run is: same seeds and controls every time."""

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained parts as a checkpoint folder."""


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors and scalars do not (LlamaGen's rule). Covers every trainable parameter exactly once."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    assert len(matrices) + len(vectors) == len(trained), (len(matrices), len(vectors), len(trained))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(network, config.weight_decay), lr=config.lr,
                             betas=(config.beta1, config.beta2))


class Batches:
    """Batches by step; a thread makes the next step's while this one trains. `make` depends on the step alone."""

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]]) -> None:
        self.make = make
        self.pool = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[tuple[Tensor, ...]]] = {}

    def get(self, step: int) -> tuple[Tensor, ...]:
        """The batch of `step`."""
        now = self.ahead.get(step) or self.pool.submit(self.make, step)
        self.ahead = {step + 1: self.pool.submit(self.make, step + 1)}
        return now.result()


class Progress:
    """Where a run stands; saved with every checkpoint."""

    def __init__(self, objective: Objective) -> None:
        self.step = 0
        self.objective = objective

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        return {"step": self.step, "objective": self.objective.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate."""
        self.step = state["step"]
        self.objective.load_state_dict(state["objective"])


class Trainer:
    """One run of one objective, resumable at any checkpoint."""

    def __init__(self, config: RunConfig, objective: Objective) -> None:
        self.config = config
        self.objective = objective
        self.folder = config.folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision=config.train.precision,
                                       project_config=ProjectConfiguration(project_dir=str(self.folder)))
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        optimizer = build_optimizer(objective.network, config.optim)
        schedule = get_cosine_schedule_with_warmup(optimizer, config.optim.warmup_steps, config.optim.steps)
        self.network, self.optimizer = self.accelerator.prepare(objective.network, optimizer)
        self.schedule = schedule
        self.progress = Progress(objective)
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(lambda step: objective.batch(step, index, count))
        self.ema = EMAModel(self.bare().parameters(), decay=config.train.ema_decay, use_ema_warmup=True,
                            power=0.75) if config.train.ema_decay else None
        self.accelerator.register_for_checkpointing(self.progress, self.schedule,
                                                    *([self.ema] if self.ema else []))
        self.step_network = torch.compile(self.network) if config.train.compile else self.network

    def bare(self) -> nn.Module:
        """The network without wrappers."""
        return self.accelerator.unwrap_model(self.network)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def save(self) -> None:
        """Write a checkpoint under a temporary name, then rename: a kill leaves the previous one usable."""
        final = self.folder / f"checkpoint-{self.progress.step}"
        if final.exists():
            return
        temporary = self.folder / f".writing-{self.progress.step}"
        shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(temporary, final)
            for old in self.checkpoints()[:-self.config.train.keep]:
                shutil.rmtree(old)

    def resume(self, source: str) -> None:
        """Load "latest" (nothing if there is none) or the checkpoint folder `source`. Raises ConfigError."""
        if source == "latest":
            found = self.checkpoints()
            if not found:
                return
            path = found[-1]
        else:
            path = Path(source)
        if not path.is_dir():
            raise ConfigError(f"--resume {source}: no such checkpoint; give 'latest' or a checkpoint-N folder of a run")
        self.accelerator.load_state(str(path))
        self._forget_log()
        _log.warning("resumed %s at step %d", path, self.progress.step)

    def _forget_log(self) -> None:
        """Drop log lines of steps that a kill after the checkpoint has undone."""
        path = self.folder / "log.jsonl"
        if path.exists() and self.accelerator.is_main_process:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= self.progress.step)
            temporary = path.with_suffix(".writing")
            temporary.write_text(kept, encoding="utf-8")
            os.replace(temporary, path)

    def export(self) -> Path:
        """Write the averaged weights (or the plain ones without an average) to the run's `export` folder."""
        folder = self.folder / "export"
        with self._averaged():
            self.objective.export(self.bare(), folder)
            self.objective.sample(self.bare()).save(self.folder / f"sample-{self.progress.step:06d}.png")
        return folder

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for as long as the block lasts."""
        if self.ema is None or self.progress.step == 0:
            yield
            return
        self.ema.store(self.bare().parameters())
        self.ema.copy_to(self.bare().parameters())
        yield
        self.ema.restore(self.bare().parameters())

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns figures to log."""
        batch = self.batches.get(self.progress.step)
        loss, figures = self.step_network(*(tensor.to(self.accelerator.device) for tensor in batch))
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.bare().parameters())
        self.progress.step += 1
        extra = self.objective.after_step(self.progress.step, self.bare())
        return {"loss": float(loss.detach()), "norm": float(norm),
                **{name: float(value) for name, value in figures.items()}, **extra}

    def log(self, figures: dict[str, float]) -> None:
        """Append one JSON line to the run's log."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.progress.step, **figures}) + "\n")

    def fit(self) -> Path:
        """Train to the configured number of steps or minutes, save, export. Returns the export folder."""
        config = self.config.train
        main = self.accelerator.is_main_process
        self.network.train()
        start = saved = sampled = time.monotonic()
        bar = tqdm(total=self.config.optim.steps, initial=self.progress.step, file=sys.stderr, unit="step",
                   disable=not main, desc=self.config.name)
        while self.progress.step < self.config.optim.steps:
            began = time.monotonic()
            figures = self.train_step()
            now = time.monotonic()
            bar.update()
            if main and self.progress.step % config.log_steps == 0:
                images = self.config.data.batch_size * self.accelerator.num_processes / (now - began)
                self.log({**figures, "images_per_second": images, "lr": self.schedule.get_last_lr()[0]})
                bar.set_postfix({**{k: f"{v:.4g}" for k, v in figures.items()}, "img/s": f"{images:.3g}"})
            due = config.save_steps and self.progress.step % config.save_steps == 0
            if due or now - saved > config.save_minutes * 60:
                self.save()
                saved = time.monotonic()
            if main and now - sampled > config.sample_minutes * 60:
                self.export()
                self.network.train()
                sampled = time.monotonic()
            if config.max_minutes and now - start > config.max_minutes * 60:
                break
        self.save()
        bar.close()
        return self.export()


def train(config: RunConfig, objective: Objective, resume: str = "latest") -> Path:
    """Run `objective` from its last checkpoint (or the start). Returns the export folder."""
    set_seed(config.seed)
    trainer = Trainer(config, objective)
    trainer.resume(resume)
    return trainer.fit()
