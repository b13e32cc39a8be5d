"""Several networks in one step: the tokenizer against its discriminator, and turns that players take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from arimg.errors import ConfigError, MissingExtraError
from arimg.tokenizers.losses import ImageLossConfig
from arimg.tokenizers.vq import VQConfig
from arimg.train.data_config import BucketConfig, CropConfig, DataConfig
from arimg.train.loop import Trainer, train
from arimg.train.objective import Player, SingleNetwork
from arimg.train.run import AdamWConfig, LoopConfig, OptimConfig, RunConfig
from arimg.train.tokenizer import LpipsFiles, TokenizerObjective, TokenizerRun
from tests.train.toy_emoji import write_toy_emoji

START = 2


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizerRun:
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    write_toy_emoji(tmp_path / "data" / "emoji-128", size=32)
    return TokenizerRun(
        objective="tokenizer", name="gan", data=DataConfig(batch_size=2, crop=CropConfig("window", 24)),
        optim=OptimConfig(steps=6, lr=1e-3, warmup_steps=0, schedule="constant", clip_norm=0.5),
        adversary=AdamWConfig(lr=1e-4, warmup_steps=0, schedule="linear", clip_norm=0.25),
        loss=ImageLossConfig(perceptual=0.0, adversarial=0.5, start_step=START), train=LoopConfig(log_steps=1),
        model=VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1), res_blocks=1,
                       z_channels=8))


def copies(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_the_discriminator_starts_when_it_is_told_to(config: TokenizerRun) -> None:
    trainer = Trainer(config, TokenizerObjective(config))
    trainer.train_mode()
    adversary = trainer.learners["adversary"]
    for step in range(4):
        before = copies(adversary.module)
        figures = trainer.train_step()
        moved = any(not torch.equal(old, new) for old, new in zip(before, adversary.module.parameters()))
        assert moved == ("adversary_loss" in figures) == ("adversary_norm" in figures) == (step >= START)
        assert {"loss", "norm", "psnr", "usage"} <= figures.keys()
    assert adversary.updates == 4 - START and trainer.first.updates == 4
    assert adversary.ema is None and trainer.first.ema is not None
    # Its schedule counts its own updates: linear from 1e-4 over the 4 steps that it has.
    assert adversary.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 2 / 4)
    assert trainer.first.optimizer.param_groups[0]["lr"] == 1e-3


def test_one_step_of_both_sides_by_hand(config: TokenizerRun) -> None:
    """Both losses are of the weights before the step (LlamaGen section 2.1), and each side moves its own alone."""
    config = replace(config, loss=replace(config.loss, start_step=0), train=LoopConfig(log_steps=1, ema_decay=0))
    objective, twin = TokenizerObjective(config), TokenizerObjective(config)
    trainer = Trainer(config, objective)
    trainer.train_mode()
    trainer.train_step()

    images = twin.batch(0, 0)[0].contiguous(memory_format=torch.channels_last)
    assert twin.adversary is not None
    twin.network.train(), twin.adversary.train()
    optimizers = []
    for network, optim in ((twin.network, config.optim), (twin.adversary, config.adversary)):
        assert optim is not None
        matrices = [p for p in network.parameters() if p.ndim >= 2]
        vectors = [p for p in network.parameters() if p.ndim < 2]
        optimizers.append(torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
                                            lr=optim.lr, betas=(0.9, 0.95), weight_decay=0.05))
    recon, _, quantiser = twin.network.tokenizer(images)
    judge = twin.adversary.discriminator
    own = (recon - images).square().mean() + quantiser.vq + quantiser.commit
    gradients = torch.autograd.grad(own - 0.5 * judge(recon).mean(), list(twin.network.parameters()))
    real, fake = judge(images), judge(recon.detach())
    (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2).backward()
    for parameter, gradient in zip(twin.network.parameters(), gradients):
        parameter.grad = gradient
    for network, limit, optimizer in ((twin.network, 0.5, optimizers[0]), (twin.adversary, 0.25, optimizers[1])):
        nn.utils.clip_grad_norm_(network.parameters(), limit)
        optimizer.step()
    for mine, other in ((objective.network, twin.network), (objective.adversary, twin.adversary)):
        assert mine is not None
        for one, two in zip(mine.parameters(), other.parameters()):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_resumed_game_goes_on(config: TokenizerRun) -> None:
    straight = Trainer(config, TokenizerObjective(config))
    straight.train_mode()
    for _ in range(START + 1):
        straight.train_step()
    straight.save()
    straight.train_step()
    resumed = Trainer(config, TokenizerObjective(config))
    resumed.resume("latest")
    resumed.train_mode()
    resumed.train_step()
    for name, learner in straight.learners.items():
        assert learner.updates == resumed.learners[name].updates
        assert all(torch.equal(one, two) for one, two in zip(learner.module.state_dict().values(),
                                                             resumed.learners[name].module.state_dict().values()))


def test_contradictions(config: TokenizerRun) -> None:
    with pytest.raises(ConfigError, match="data.crop.size=16: too small for the discriminator"):
        replace(config, data=DataConfig(crop=CropConfig("window", 16)))
    for data in (DataConfig("shards", "x", crop=CropConfig("random", 24), buckets=BucketConfig()),
                 DataConfig("shards", "x", crop=CropConfig("random", 24), cache="y")):
        with pytest.raises(ConfigError, match="a tokenizer is trained on crops of one size"):
            replace(config, data=data)
    with pytest.raises(ConfigError, match="give both lpips.vgg and lpips.heads"):
        LpipsFiles(vgg="vgg16.pth")


def test_a_tracker_that_is_not_installed(config: TokenizerRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arimg.train.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"train.trackers: wandb needs wandb.*arimg\[trackers\]"):
        Trainer(replace(config, train=LoopConfig(trackers=("wandb",))), TokenizerObjective(config))


class Memory(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory, main_process_only = "memory", False, True

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None, **kwargs: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackers_hear_what_the_log_says(config: TokenizerRun, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    monkeypatch.setattr("arimg.train.loop.check_trackers", lambda names: [memory])
    config = replace(config, optim=replace(config.optim, steps=2),
                     train=LoopConfig(log_steps=1, validate_steps=2, trackers=("wandb",)))
    train(config, TokenizerObjective(config))
    assert memory.config["optim.lr"] == 1e-3 and memory.config["model.multipliers"] == "[1, 1]" and memory.finished
    lines = [json.loads(line) for line in (config.folder() / "log.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in memory.logged] == lines
    assert [line["step"] for line in lines] == [1, 2, 2] and lines[2]["validation_loss"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Turns: K updates of one player for each of the other, as Distilled Decoding 2 takes them


class Turns(SingleNetwork):
    """Two numbers; `often` has three turns, then `seldom` one."""

    def __init__(self) -> None:
        self.config = RunConfig(name="turns", optim=OptimConfig(steps=8), train=LoopConfig(log_steps=1))
        self.networks = {name: nn.Linear(1, 1) for name in ("often", "seldom")}

    def players(self) -> dict[str, Player]:
        return {name: Player(network, AdamWConfig(schedule="constant", warmup_steps=0), 8)
                for name, network in self.networks.items()}

    def batch(self, step: int, micro: int) -> tuple[Tensor, ...]:
        return (torch.full((2, 1), float(step + 1)),)

    def losses(self, networks: Mapping[str, nn.Module], batch: tuple[Tensor, ...],
               step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        name = "seldom" if step % 4 == 3 else "often"
        return {name: networks[name](*batch).square().mean()}, {}


def test_players_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    objective: Any = Turns()
    trainer = Trainer(objective.config, objective)
    figures = [trainer.train_step() for _ in range(8)]
    assert [sorted(one) for one in figures] == ([["loss", "norm"]] * 3 + [["seldom_loss", "seldom_norm"]]) * 2
    assert {name: learner.updates for name, learner in trainer.learners.items()} == {"often": 6, "seldom": 2}
