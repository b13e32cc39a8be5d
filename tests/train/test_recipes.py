"""Every YAML file under configs/ parses, builds and does its work at toy size; mistakes in one are told in a line."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest

from arimg.commands.eval import command as eval_command
from arimg.errors import ArimgError, ConfigError
from arimg.registry import OBJECTIVES
from arimg.train.launch import load_run
from arimg.train.loop import Trainer
from tests.train.shrink import fake_extractors, fill_caches, shrink, write_toys

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted((CONFIGS / "train").rglob("*.yaml"))
EVALUATIONS = sorted((CONFIGS / "eval").rglob("*.yaml"))
COUNTS = {"train/emoji": 8, "train/llamagen": 15, "train/controlar": 11, "train/var": 1, "train/mar": 4,
          "train/dd": 10, "eval": 7}


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(autouse=True)
def toys(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(root))
    fake_extractors(monkeypatch.setitem)


def test_no_file_escapes_these_tests() -> None:
    folders = Counter(path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.y*ml"))
    assert folders == COUNTS and len(RECIPES) + len(EVALUATIONS) == sum(COUNTS.values())


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_takes_a_step(path: Path, root: Path) -> None:
    config = shrink(path, root)
    fill_caches(config)
    trainer = Trainer(config, OBJECTIVES.load(config.objective)(config))
    before = {name: tensor.clone() for name, tensor in trainer.first.module.named_parameters()}
    figures = trainer.train_step()
    assert math.isfinite(figures["loss"])
    changed = [name for name, tensor in trainer.first.module.named_parameters() if not tensor.equal(before[name])]
    assert len(changed) > len(before) / 4, "one step of a head that starts at zero moves few parameters, but many"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_what_it_needs_and_what_to_expect(path: Path) -> None:
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[0] == "#")
    assert f"{path.relative_to(CONFIGS.parent)}" in head or "How to run it: c2i-b-256.yaml" in head
    assert "Hardware" in head
    assert "Number to expect" in head or "emoji" in path.parts


@pytest.mark.parametrize("path", EVALUATIONS, ids=name_of)
def test_an_evaluation_is_understood(path: Path) -> None:
    kind = re.search(r"arimg eval (\w+)", path.read_text(encoding="utf-8"))
    assert kind is not None and isinstance(eval_command, click.Group)
    command = eval_command.commands[kind[1]]
    context = click.Context(command)
    parser = command.make_parser(context)
    values, _, order = parser.parse_args(["--config", str(path)])
    for param in click.core.iter_params_for_processing(order, command.get_params(context)):
        if param.name != "help" and not (param.required and param.name not in values):
            param.handle_parse_result(context, values, [])
    assert context.default_map


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BASE = "objective: control\nname: x\ntokenizer: t\n"


@pytest.mark.parametrize(("text", "overrides", "message"), [
    ("data: {foldr: x}", (), "unknown key data.foldr; did you mean data.folder?"),
    ("data: {crop: {sice: 3}}", (), "unknown key data.crop.sice; did you mean data.crop.size?"),
    ("data: {buckets: {maxside: 3}}", (), "unknown key data.buckets.maxside; did you mean data.buckets.max_side?"),
    ("model: {layer: 3}", (), "unknown key model.layer; did you mean model.layers?"),
    ("control: {embed_dims: 3}", (), "unknown key control.embed_dims; did you mean control.embed_dim?"),
    ("tokeniser: y", (), "unknown key tokeniser; did you mean tokenizer?"),
    ("", ("optim.step=3",), "unknown key optim.step; did you mean optim.steps?"),
    ("", ("train.precison=bf16",), "unknown key train.precison; did you mean train.precision?"),
    ("", ("objective=contol",), "unknown objective 'contol'; did you mean control"),
    ("control: {types: [cany]}", (), "unknown control type 'cany'; did you mean canny"),
    ("data: {source: shard}", (), "unknown data.source 'shard'; did you mean shards"),
    ("data: {crop: {kind: tne}}", (), "unknown crop 'tne'; did you mean ten"),
    ("maps: cache", (), "unknown maps 'cache'; did you mean cached"),
    ("settings: {decoder: jacoby}", (), "unknown decoder 'jacoby'; did you mean jacobi"),
    ("optim: {schedule: constnt}", (), "unknown schedule 'constnt'; did you mean constant"),
])
def test_a_misspelt_key_or_name_is_answered_with_the_nearest(
        tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ArimgError) as caught:
        load_run(write(tmp_path, f"{BASE}{text}\n"), overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("override", "message"), [
    ("name=../../elsewhere", "name=../../elsewhere: .* write it without slashes"),
    ("name=..", "write it without slashes"),
    ("seed=-1", "seed=-1: must be a whole number from 0"),
    ("optim.lr=-1", r"optim.lr=-1.0: must be at least 0"),
    ("train.ema_decay=2", r"train.ema_decay=2.0: must be at least 0 and below 1"),
    ("control_dropout=3", "control_dropout=3.0: is a share"),
    ("model.class_dropout=-1", "model.class_dropout=-1.0: is a share"),
    ("model.layers=1000000000", "layers=1000000000: must be from 1 to 1000"),
    ("model.heads=0", "heads=0: must be from 1"),
    ("train.trackers=tensorboard", r"needs a list, for example \[a, b\]"),
])
def test_values_out_of_range(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(write(tmp_path, BASE), (override,))


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "${oc.env:NOT_SET,x}", "${name}", "a${oc.env:SECRET}b",
                                   "${oc.decode:${oc.env:SECRET}}"])
@pytest.mark.parametrize("where", ["tokenizer: '{}'", "data: {{folder: '{}'}}", "settings: {{class_names: ['{}']}}",
                                   "type_weights: {{canny: '{}'}}", "optim: {{steps: '{}'}}", "model: '{}'"])
def test_a_strangers_file_cannot_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str,
                                                      where: str) -> None:
    monkeypatch.setenv("SECRET", "password")
    text = "objective: control\nname: x\n" + ("" if where.startswith("tok") else "tokenizer: t\n")
    with pytest.raises(ConfigError) as caught:
        load_run(write(tmp_path, text + where.format(value) + "\n"))
    assert "password" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["objective: ${oc.env:SECRET}\n", "${oc.env:SECRET}: x\nobjective: ar\n"])
def test_nor_by_the_objective_or_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SECRET", "password")
    with pytest.raises(ArimgError) as caught:
        load_run(write(tmp_path, text))
    assert "password" not in str(caught.value)


def test_nor_by_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "password")
    with pytest.raises(ConfigError, match="interpolations are refused"):
        load_run(write(tmp_path, BASE), ("init_from=${oc.env:SECRET}",))


@pytest.mark.parametrize("value", ["${oc.create:${oc.decode:${oc.env:SECRET}}}", "${oc.decode:${oc.env:SECRET}}"])
def test_nor_by_a_section_that_an_override_is_merged_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          value: str) -> None:
    """omegaconf resolves such a section when it merges."""
    monkeypatch.setenv("SECRET", "{folder: password}")
    with pytest.raises(ConfigError, match="data = .*interpolations are refused") as caught:
        load_run(write(tmp_path, f"{BASE}data: {value}\n"), ("data.workers=3",))
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("path", [path for path in RECIPES if "\ninit_from: ???" in path.read_text()], ids=name_of)
def test_a_second_stage_asks_for_the_first(path: Path) -> None:
    with pytest.raises(ConfigError, match="init_from: is left for you to fill in; write init_from=VALUE"):
        load_run(path, ("data.folder=x",))


def test_published_hyper_parameters() -> None:
    """Spot checks against the published table (specification sections 2.7 and 3.6)."""
    fields: dict[str, dict[str, Any]] = {
        "llamagen/c2i-b-256": {"optim.lr": 1e-4, "optim.schedule": "constant", "optim.weight_decay": 0.05,
                               "optim.clip_norm": 1.0, "optim.beta2": 0.95, "model.class_dropout": 0.1},
        "llamagen/c2i-3b-384": {"optim.lr": 2e-4, "model.block_size": 576, "model.dim": 3200, "data.batch_size": 16},
        "llamagen/vq-16": {"optim.lr": 1e-4, "loss.start_step": 20000, "loss.adversarial": 0.5},
        "controlar/c2i-canny-b": {"optim.lr": 1e-4, "model.inject_layers": (0, 4, 8), "drop_together": 1.0},
        "controlar/t2i-depth": {"optim.lr": 5e-5, "optim.schedule": "decay", "optim.decay": 0.5},
        "controlar/t2i-seg": {"optim.decay": 0.9, "model.inject_layers": (0, 12, 24)},
        "controlar/t2i-mr-hed": {"optim.lr": 1e-5, "model.block_size": 2304, "data.buckets.max_tokens": 2304},
    }
    given = ("tokenizer=t", "data.folder=x", "init_from=x")
    for name, expected in fields.items():
        overrides = given[1:] if "vq" in name else given
        config = load_run(CONFIGS / "train" / f"{name}.yaml", overrides)
        for key, value in expected.items():
            found: Any = config
            for part in key.split("."):
                found = getattr(found, part)
            assert found == value, (name, key)
