"""The training loop: it learns, resumes exactly, exports what loads."""

import json
from dataclasses import replace

import pytest
import torch

from arimg.checkpoints import load_component
from arimg.control.adapter import ControlConfig
from arimg.errors import CheckpointError, ConfigError, UnknownNameError
from arimg.models.ar import ARConfig
from arimg.pipeline import Pipeline
from arimg.tokenizers.vq import VQConfig
from arimg.train.checkpointing import list_checkpoints
from arimg.train.control import ControlObjective, ControlRun
from arimg.train.data_config import CropConfig, DataConfig
from arimg.train.launch import load_run, main
from arimg.train.loop import Trainer, train
from arimg.train.optim import parameter_groups
from arimg.train.run import AdamWConfig, LoopConfig, OptimConfig
from arimg.train.tokenizer import TokenizerObjective, TokenizerRun
from tests.train.toy_emoji import write_toy_emoji

STEPS = 6


@pytest.fixture(autouse=True)
def arimg_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    write_toy_emoji(tmp_path / "data" / "emoji-128")
    return tmp_path


def tokenizer_run(name):
    return TokenizerRun(objective="tokenizer", name=name, revive_every=2,
                        data=DataConfig(batch_size=2, crop=CropConfig("window", 8)),
                        optim=OptimConfig(steps=STEPS, warmup_steps=1), train=LoopConfig(log_steps=1),
                        model=VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1),
                                       res_blocks=1, z_channels=8))


def control_run(name, tokenizer):
    return ControlRun(objective="control", name=name, tokenizer=str(tokenizer), data=DataConfig(batch_size=2),
                      optim=OptimConfig(steps=STEPS, warmup_steps=1), train=LoopConfig(log_steps=1),
                      model=ARConfig(vocab_size=16, dim=16, layers=3, heads=2, ffn_hidden=32, block_size=64,
                                     num_classes=2, rope_prefix="identity", rope_grid="true", inject_layers=(0, 1, 2),
                                     codebook_dim=4, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0),
                      control=ControlConfig(embed_dim=8, depth=1, heads=2, ffn_hidden=16, patch=2, stride=2, dim=16))


def log_of(config):
    lines = (config.folder() / "log.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def stop_early_then_resume(config, objective):
    """Three steps as if killed after its checkpoint, then a new process to the end."""
    first = Trainer(config, objective(config))
    for _ in range(STEPS // 2):
        first.log(first.train_step())
    first.save()
    first.train_step()                      # lost with the kill
    return train(config, objective(config))


@pytest.fixture
def tokenizer_folder():
    config = tokenizer_run("tokenizer")
    return train(config, TokenizerObjective(config)) / "tokenizer"


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_resumed_tokenizer_run_equals_an_uninterrupted_one(tokenizer_folder):
    config = tokenizer_run("resumed")
    folder = stop_early_then_resume(config, TokenizerObjective)
    assert_same_weights(load_component(folder / "tokenizer"), load_component(tokenizer_folder))
    assert log_of(config) == log_of(tokenizer_run("tokenizer"))


def test_resumed_control_run_equals_an_uninterrupted_one(tokenizer_folder):
    straight, resumed = (control_run(name, tokenizer_folder) for name in ("straight", "resumed"))
    left = train(straight, ControlObjective(straight))
    right = stop_early_then_resume(resumed, ControlObjective)
    for name in ("transformer", "control"):
        assert_same_weights(load_component(left / name), load_component(right / name))
    assert log_of(straight) == log_of(resumed)


def test_the_control_export_is_a_pipeline(tokenizer_folder):
    config = control_run("control", tokenizer_folder)
    pipeline = Pipeline.from_pretrained(train(config, ControlObjective(config)))
    out = pipeline(class_name="toy/odd", seeds=[1])
    assert out.images[0].size == (16, 16)
    assert (config.folder() / f"sample-{STEPS:06d}.png").is_file()


def test_an_incomplete_checkpoint_is_not_resumed(arimg_home):
    config = tokenizer_run("half")
    (config.folder() / ".writing-3").mkdir(parents=True)
    trainer = Trainer(config, TokenizerObjective(config))
    trainer.resume("latest")
    assert trainer.step == 0


def test_only_the_newest_checkpoints_are_kept():
    config = tokenizer_run("kept")
    trainer = Trainer(config, TokenizerObjective(config))
    for _ in range(4):
        trainer.train_step()
        trainer.save()
    assert [path.name for path in list_checkpoints(config.folder())] == ["checkpoint-3", "checkpoint-4"]


def test_max_minutes_stops_and_saves():
    config = replace(tokenizer_run("short"), train=LoopConfig(max_minutes=1e-9))
    train(config, TokenizerObjective(config))
    assert (config.folder() / "checkpoint-1").is_dir()


@pytest.mark.parametrize("minutes, saved, sampled", [(0.0, [6], [6]), (1e-9, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])])
def test_no_minutes_means_not_by_time(minutes, saved, sampled):
    config = replace(tokenizer_run("timed"), train=LoopConfig(save_minutes=minutes, sample_minutes=minutes, keep=9))
    train(config, TokenizerObjective(config))
    assert [int(path.name.partition("-")[2]) for path in list_checkpoints(config.folder())] == saved
    assert sorted(int(path.stem.partition("-")[2]) for path in config.folder().glob("sample-*.png")) == sampled


def test_parameter_groups_partition_the_parameters():
    network = TokenizerObjective(tokenizer_run("groups")).network
    decayed, plain = parameter_groups(network, AdamWConfig(weight_decay=0.1))
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))
    assert all(parameter.ndim >= 2 for parameter in decayed["params"]) and plain["weight_decay"] == 0


def test_a_missing_checkpoint_to_resume_is_one_line():
    config = tokenizer_run("missing")
    trainer = Trainer(config, TokenizerObjective(config))
    with pytest.raises(ConfigError, match="no such checkpoint"):
        trainer.resume("elsewhere/checkpoint-9")


@pytest.mark.parametrize("text, error, message", [
    ("name: x\n", ConfigError, "has no objective"),
    ("objective: tokeniser\nname: x\n", UnknownNameError, "did you mean tokenizer"),
    ("objective: tokenizer\n", ConfigError, "name: is empty"),
    ("objective: control\nname: x\n", ConfigError, "tokenizer: is empty"),
    ("objective: ar\nname: x\ntokenizer: y\ntoken_noise: 1.5\n", ConfigError, "write a number from 0 to 1"),
    ("objective: tokenizer\nname: x\noptim: {step: 3}\n", ConfigError, "did you mean optim.steps"),
])
def test_recipe_faults_are_one_line(tmp_path, text, error, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_run(path)
    assert "\n" not in str(caught.value)


def test_launch_keeps_the_resolved_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("objective: tokenizer\nname: launched\ndata: {batch_size: 2, crop: {kind: window, size: 8}}\n"
                    "optim: {steps: 1}\nmodel: {codebook_size: 16, base_channels: 32, multipliers: [1, 1], "
                    "res_blocks: 1, z_channels: 8}\n")
    folder = main(path, ["optim.lr=1e-3"])
    assert "lr: 0.001" in (folder.parent / "config.yaml").read_text()


def test_a_run_starts_from_given_weights(tokenizer_folder):
    config = replace(tokenizer_run("second"), init_from=str(tokenizer_folder))
    assert_same_weights(TokenizerObjective(config).network.tokenizer, load_component(tokenizer_folder))


def test_a_control_run_starts_from_given_weights(tokenizer_folder):
    config = control_run("control", tokenizer_folder)
    folder = train(config, ControlObjective(config))
    network = ControlObjective(replace(config, name="second", init_from=str(folder))).network
    assert_same_weights(network.transformer, load_component(folder / "transformer"))
    assert_same_weights(network.control, load_component(folder / "control"))


@pytest.mark.parametrize("spoil", ["loss", "weights"])
def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(spoil, monkeypatch):
    config = replace(tokenizer_run("diverged"), train=LoopConfig(log_steps=1 if spoil == "loss" else 9, save_steps=2))
    trainer = Trainer(config, TokenizerObjective(config))
    whole = trainer.train_step

    def train_step():
        figures = whole()
        if trainer.step == 4 and spoil == "weights":
            next(trainer.first.module.parameters()).data.fill_(torch.nan)
        return {**figures, "loss": torch.tensor(torch.nan)} if trainer.step == 4 else figures
    monkeypatch.setattr(trainer, "train_step", train_step)
    with pytest.raises(CheckpointError, match="is nan at step 4: the run has diverged.*lower optim.lr"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(config.folder())] == ["checkpoint-2"]
