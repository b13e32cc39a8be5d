"""The one training loop. An objective (train/objective.py) supplies networks, batches and losses; the rest is here.

A batch is a function of (seed, step, micro), and so are the random numbers of its forward pass. Step s takes the
micro-batches 0 .. processes * accumulation - 1, those of a process in one piece. So two processes compute what one with
twice the accumulation does, and a resumed run what an uninterrupted one would.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from arimg.config import dump_config
from arimg.devices import training_precision
from arimg.errors import CheckpointError
from arimg.images import replacing
from arimg.train.checkpointing import write_checkpoint
from arimg.train.interrupt import Interrupt
from arimg.train.learner import Learner
from arimg.train.objective import Batch, Figures, Objective
from arimg.train.resume import find_checkpoint, forget_log, library_versions
from arimg.train.run import RunConfig
from arimg.train.trackers import check_trackers, flat

_log = logging.getLogger("arimg")


class Batches:
    """Batches by number; a thread makes the next one while this one trains. `make` depends on the number alone."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make
        self.pool = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[Batch]] = {}

    def get(self, number: int) -> Batch:
        """The batch of that number."""
        now = self.ahead.get(number) or self.pool.submit(self.make, number)
        self.ahead = {number + 1: self.pool.submit(self.make, number + 1)}
        return now.result()


class Trainer:
    """One run of one objective, resumable at any checkpoint of its folder (None = where the config says)."""

    def __init__(self, config: RunConfig, objective: Objective, folder: Path | None = None) -> None:
        self.config = config
        self.objective = objective
        self.folder = config.folder() if folder is None else folder
        self.folder.mkdir(parents=True, exist_ok=True)
        trackers = check_trackers(config.train.trackers)
        precision = training_precision(config.train.precision, torch.device("cpu" if on_cpu() else "cuda"))
        self.accelerator = Accelerator(cpu=on_cpu(), mixed_precision=precision,
                                       log_with=trackers or None, project_dir=str(self.folder))
        assert self.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1)), "processes that never meet"
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.step = 0
        self.saved_step = 0
        self.learners = {name: Learner(self.accelerator, player, config.train)
                         for name, player in objective.players().items()}
        self.networks = {name: learner.network for name, learner in self.learners.items()}
        self.first = next(iter(self.learners.values()))
        accumulation, index = config.train.accumulation, self.accelerator.process_index
        self.micros = self.accelerator.num_processes * accumulation      # of a step, on all processes
        self.batches = Batches(lambda number: objective.batch(number // accumulation,
                                                              index * accumulation + number % accumulation))

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def train_step(self) -> dict[str, Any]:
        """One step of every player whose turn it is; returns figures to log: numbers and tensors of this process."""
        accumulation = self.config.train.accumulation
        passes = []
        for k in range(accumulation):
            with self._gradients_shared(k == accumulation - 1):
                passes.append(self._micro_step(k))
        scalars = [name for name, value in passes[0].items() if not isinstance(value, Tensor) or not value.ndim]
        means: dict[str, Any] = {name: sum(one[name] for one in passes) / accumulation for name in scalars}
        seen = {name: self.accelerator.gather(torch.cat([one[name] for one in passes]))
                for name, value in passes[0].items() if name not in means}
        for name, learner in self.learners.items():
            if f"{name}_loss" in means:
                means[f"{name}_norm"] = learner.update()
        self.step += 1
        for learner in self.learners.values():
            if learner.player.renewed_at == self.step:
                learner.renew()
        extra = self.objective.after_step(self.step, self.first.module, seen)
        return {**_named_after_first(means, next(iter(self.learners))), **extra}

    def _micro_step(self, k: int) -> Figures:
        """Forward and backward of this process's k-th micro-batch: `NAME_loss` of each player, and figures."""
        accumulation = self.config.train.accumulation
        micro = self.accelerator.process_index * accumulation + k
        batch = self.batches.get(self.step * accumulation + k)
        torch.manual_seed(_pass_seed(self.config.seed, self.step, micro))
        figures: dict[str, Any] = {"data": checksum(batch)} if self.config.train.log_data else {}
        with self.accelerator.autocast():
            losses, shown = self.objective.losses(
                self.networks, tuple(tensor.to(self.accelerator.device) for tensor in batch), self.step)
        for loss in losses.values():
            self.accelerator.backward(loss / accumulation)
        return {**{f"{name}_loss": loss.detach() for name, loss in losses.items()},
                **{name: value.detach() for name, value in shown.items()}, **figures}

    @contextmanager
    def _gradients_shared(self, shared: bool) -> Iterator[None]:
        """Processes exchange gradients in the last micro-batch alone."""
        with ExitStack() as stack:
            for learner in self.learners.values():
                if not shared:
                    stack.enter_context(self.accelerator.no_sync(learner.network))
            yield

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint, unless this step has one. Raises CheckpointError when the disk refuses, and rather than
        keep weights that are not numbers any more."""
        if self.saved_step == self.step:
            return
        parts: dict[str, Any] = {"loop": {"step": self.step, "micros": self.micros,
                                          "objective": self.objective.state_dict()}}
        for name, learner in self.learners.items():
            parts |= {f"{name}.{kind}": part for kind, part in learner.state().items()}
            self._check_finite({key: tensor.sum() for key, tensor in parts[f"{name}.weights"].items()})
        error = None
        if self.accelerator.is_main_process:
            texts = {"config.yaml": dump_config(self.config), "versions.json": json.dumps(library_versions(), indent=1)}
            try:
                write_checkpoint(self.folder, self.step, parts, texts, self.config.train.keep)
            except CheckpointError as caught:
                error = caught
        if any(self._agreed([error is not None])):
            raise error or SystemExit(2)        # one process tells the user
        self.saved_step = self.step

    def resume(self, source: str) -> None:
        """Go on from "latest" (the start if there is none), from the start ("none") or from a checkpoint folder.

        Raises CheckpointError and ConfigError when that cannot be done without loss, see train/resume.py.
        """
        found = find_checkpoint(source, self.config, self.micros)
        if found is None:
            return
        path, parts = found
        for name, learner in self.learners.items():
            learner.load({kind: parts[f"{name}.{kind}"] for kind in ("weights", "optimizer", "average")},
                         f"{path} ({name})")
        self.objective.load_state_dict(parts["loop"]["objective"])
        self.step = self.saved_step = parts["loop"]["step"]
        if self.accelerator.is_main_process:
            forget_log(self.folder / "log.jsonl", self.step)
            _log.warning("resumed %s at step %d", path, self.step)

    # -----------------------------------------------------------------------------------------------------------------
    # What a run shows

    def export(self) -> Path:
        """Write the averaged weights (or the plain ones without an average) to the run's `export` folder."""
        folder = self.folder / "export"
        with self._showing() as network:
            if network is not None:
                self.objective.export(network, folder)
                with replacing(self.folder / f"sample-{self.step:06d}.png") as stream:
                    self.objective.sample(network).save(stream, "png")
        return folder

    def validate(self) -> None:
        """Log the loss of the averaged weights on held-out data."""
        with self._showing() as network:
            if network is not None:
                self._record({"validation_loss": self.objective.validation_loss(network)})

    @contextmanager
    def _showing(self) -> Iterator[nn.Module | None]:
        """The first network, averaged and in eval mode, on the main process; None on the others, which wait."""
        with self.first.averaged() as network:
            network.eval()
            yield network if self.accelerator.is_main_process else None
        self.train_mode()
        self.accelerator.wait_for_everyone()

    def train_mode(self) -> None:
        """Dropout and batch norm as training wants them."""
        for learner in self.learners.values():
            learner.network.train()

    def log(self, figures: dict[str, Any]) -> dict[str, float]:
        """Means over the processes, to the log and the trackers. All processes must call at once."""
        numbers = torch.tensor([float(value) for value in figures.values()], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            numbers = self.accelerator.reduce(numbers.to(self.accelerator.device), "mean")
        means = dict(zip(figures, numbers.tolist()))
        if self.accelerator.is_main_process:
            self._record(means)
        return means

    def _check_finite(self, figures: Mapping[str, Tensor | float]) -> None:
        """Raises CheckpointError for NaN or infinity: every later step would be lost. All processes see the same."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise CheckpointError(
                    f"{self.config.name}: {name} is {float(value)} at step {self.step}: the run has diverged; take its "
                    "last checkpoint or start again, with a lower optim.lr, more optim.warmup_steps or another seed")

    def _record(self, figures: dict[str, float]) -> None:
        """One JSON line of the run's log; the same to the trackers."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **figures}) + "\n")
        if self.config.train.trackers:
            self.accelerator.log(figures, step=self.step)

    def _agreed(self, wishes: list[bool]) -> list[bool]:
        """Which of the wishes any process has."""
        if self.accelerator.num_processes == 1:
            return wishes
        counts = torch.tensor(wishes, dtype=torch.float32, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(counts, "sum").tolist()]

    # -----------------------------------------------------------------------------------------------------------------
    # A run

    def start_records(self) -> None:
        """The resolved config beside the log; the trackers."""
        if self.accelerator.is_main_process:
            temporary = self.folder / "config.writing"
            temporary.write_text(dump_config(self.config), encoding="utf-8")
            os.replace(temporary, self.folder / "config.yaml")
        if self.config.train.trackers:
            self.accelerator.init_trackers("log", config=flat(self.config))

    def fit(self) -> Path:
        """Train to the configured number of steps or minutes, save, export. Returns the export folder. A signal that
        asks to stop ends the process with 128 + its number, after a checkpoint."""
        steps = self.config.optim.steps
        self.train_mode()
        images = self.config.data.batch_size * self.micros      # of a step
        clock = Clock(self.config, self.step)
        bar = tqdm(total=steps, initial=self.step, file=sys.stderr, unit="step", desc=self.config.name,
                   disable=not self.accelerator.is_main_process)
        with Interrupt() as interrupt, bar:
            while self.step < steps:
                figures = self.train_step()
                bar.update()
                if self.step % self.config.train.log_steps == 0:
                    means = self.log({**figures, "lr": self.first.optimizer.param_groups[0]["lr"],
                                      "images_per_second": images * clock.lap(self.step)})
                    self._check_finite(means)
                    bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
                if clock.validate_at(self.step):
                    self.validate()
                save, sample, end, stop = self._agreed([*clock.due(self.step), bool(interrupt.signal)])
                if save or stop:
                    self.save()
                if stop:
                    self._stop(interrupt.signal)
                if sample and not end:
                    self.export()
                clock.done(self.step, save, sample)
                if end:
                    break
            self.save()
        return self.export()

    def _stop(self, number: int) -> None:
        """Leave after a signal; where another process got it, as after SIGTERM."""
        if self.accelerator.is_main_process:
            _log.warning("stopped by a signal at step %d, with a checkpoint; the same command goes on from there",
                         self.step)
        raise SystemExit(128 + (number or 15))


class Clock:
    """When to validate, save, sample and end; how fast the steps are."""

    def __init__(self, config: RunConfig, step: int) -> None:
        self.config = config.train
        self.start = self.saved = self.sampled = self.lap_start = time.monotonic()
        self.lap_step = step

    def validate_at(self, step: int) -> bool:
        """Whether this step is followed by a validation."""
        return bool(self.config.validate_steps) and step % self.config.validate_steps == 0

    def due(self, step: int) -> tuple[bool, bool, bool]:
        """(save, sample, end) after this step, by this process's clock."""
        config, now = self.config, time.monotonic()
        save, sample, end = (bool(minutes) and now - last > minutes * 60 for minutes, last in (
            (config.save_minutes, self.saved), (config.sample_minutes, self.sampled), (config.max_minutes, self.start)))
        return save or bool(config.save_steps) and step % config.save_steps == 0, sample, end

    def done(self, step: int, saved: bool, sampled: bool) -> None:
        """Start the clocks of what was done anew."""
        now = time.monotonic()
        self.saved, self.sampled = now if saved else self.saved, now if sampled else self.sampled
        if saved or sampled or self.validate_at(step):
            self.lap_start, self.lap_step = now, step

    def lap(self, step: int) -> float:
        """Steps per second since the last lap, or since other work ended."""
        now = time.monotonic()
        speed = (step - self.lap_step) / (now - self.lap_start)
        self.lap_start, self.lap_step = now, step
        return speed


def on_cpu() -> bool:
    """Whether there is nothing but CPUs. Accelerate has to be told, else processes on CPUs do not find each other."""
    return not torch.accelerator.is_available()


def checksum(batch: Batch) -> float:
    """A number that tells batches apart: CRC-32 of all their bytes."""
    total = 0
    for tensor in batch:
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, total)
    return float(total)


def _pass_seed(seed: int, step: int, micro: int) -> int:
    """Of the random numbers that torch draws in one forward pass, such as dropout."""
    return int(np.random.default_rng([seed, 5, step, micro]).integers(2 ** 63))


def _named_after_first(figures: dict[str, Any], first: str) -> dict[str, Any]:
    """The first player's loss and norm without its name."""
    return {name.removeprefix(f"{first}_") if name in (f"{first}_loss", f"{first}_norm") else name: value
            for name, value in figures.items()}


def train(config: RunConfig, objective: Objective, resume: str = "latest") -> Path:
    """Run `objective` from its last checkpoint (or the start). Returns the export folder."""
    trainer = Trainer(config, objective)
    trainer.resume(resume)
    trainer.start_records()
    folder = trainer.fit()
    for tracker in trainer.accelerator.trackers:
        tracker.finish()
    return folder
