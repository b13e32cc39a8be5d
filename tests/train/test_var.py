"""The objectives `var` and `var-control` at toy size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from arimg.accel.scale import scale_inputs
from arimg.checkpoints import PipelineSettings, load_component, save_component
from arimg.control.adapter import ControlConfig
from arimg.errors import ConfigError
from arimg.models.base import Condition
from arimg.models.var import VARConfig
from arimg.pipeline import Pipeline
from arimg.presets import VAR_PRESETS
from arimg.train.data_config import BucketConfig, DataConfig
from arimg.train.launch import load_run
from arimg.train.loop import train
from arimg.train.optim import build_optimizer
from arimg.train.run import LoopConfig, OptimConfig
from arimg.train.var import VARControlObjective, VARControlRun, VARObjective, VARRun
from tests.toy_scales import LENGTH, SCALES, toy_tokenizer
from tests.train.toy_emoji import write_toy_emoji

MODEL = VARConfig(vocab_size=32, codebook_dim=6, scales=SCALES, dim=32, layers=2, heads=2, num_classes=2, drop_path=0.0,
                  gamma_init=0.1, inject_layers=(0, 1))
ADAPTER = ControlConfig(embed_dim=8, depth=1, heads=2, ffn_hidden=16, patch=4, stride=4, dim=32, points=2,
                        types=("canny", "color"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    write_toy_emoji(tmp_path / "data" / "emoji-128")
    torch.manual_seed(0)
    save_component(toy_tokenizer(), tmp_path / "tokenizer")
    return tmp_path


def common(home: Path, **changes: Any) -> dict[str, Any]:
    return {"name": "toy", "tokenizer": str(home / "tokenizer"), "data": DataConfig(batch_size=8), "model": MODEL,
            "optim": OptimConfig(steps=40, lr=1e-2, warmup_steps=2), "train": LoopConfig(log_steps=1), **changes}


def test_a_batch_holds_codes_of_all_scales_and_the_cells_that_predict_them(home: Path) -> None:
    objective = VARObjective(VARRun(objective="var", **common(home)))
    codes, cells, class_ids, dropped = objective.batch(0)
    space = objective.cache.tokenizer.space()
    assert codes.shape == (8, LENGTH) and dropped.dtype == torch.bool
    assert torch.equal(cells, scale_inputs(space.codebook_VC[codes], space))
    assert all(torch.equal(one, two) for one, two in zip(objective.batch(0), (codes, cells, class_ids, dropped)))
    loss, _ = objective.network.eval()(codes, cells, class_ids, torch.zeros_like(dropped))
    logits = objective.network.transformer(cells, Condition(class_ids_B=class_ids))
    torch.testing.assert_close(loss, F.cross_entropy(logits.mT, codes))


def test_near_codes_are_read_but_not_predicted(home: Path) -> None:
    objective = VARObjective(VARRun(objective="var", **common(home, token_noise=0.9)))
    plain = VARObjective(VARRun(objective="var", **common(home)))
    (codes, cells, *_), (plain_codes, plain_cells, *_) = objective.batch(0), plain.batch(0)
    assert torch.equal(codes, plain_codes) and not torch.equal(cells, plain_cells)


def test_dropped_classes_are_the_batchs_alone(home: Path) -> None:
    objective = VARObjective(VARRun(objective="var", **common(home)))
    codes, cells, class_ids, _ = objective.batch(0)
    network, all_B = objective.network.eval(), torch.ones(8, dtype=torch.bool)
    assert torch.equal(network(codes, cells, class_ids, all_B)[0], network(codes, cells, 1 - class_ids, all_B)[0])
    assert not torch.equal(network(codes, cells, class_ids, ~all_B)[0], network(codes, cells, 1 - class_ids, ~all_B)[0])


def test_loss_falls_with_control_and_the_export_paints(home: Path) -> None:
    config = VARControlRun(objective="var-control", control=ADAPTER, **common(home))
    objective = VARControlObjective(config)
    before = objective.validation_loss(objective.network)
    folder = train(config, objective)
    assert objective.validation_loss(objective.network) < before - 0.5
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.settings.decoder == "scale"
    out = pipe(torch.ones(3, 16, 16), class_name="toy/even", control_type="canny")
    assert out.codes.shape == (1, LENGTH) and out.stats.forward_passes == len(SCALES)
    own, stored = objective.network.transformer.state_dict(), load_component(folder / "transformer").state_dict()
    assert own.keys() == stored.keys()


def test_tables_and_gates_do_not_decay(home: Path) -> None:
    objective = VARObjective(VARRun(objective="var", **common(home, model=replace(MODEL, shared_adaln=True))))
    groups = build_optimizer(objective.network, OptimConfig(weight_decay=0.05)).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name.removeprefix("transformer.") for name, parameter in objective.network.named_parameters()
             if id(parameter) in decayed}
    assert {"class_emb.weight", "head.weight", "blocks.0.attn.mat_qkv.weight", "shared_ada_lin.1.weight"} <= names
    assert not any(part in name for name in names for part in ("pos_", "lvl_", "ada_gss", "scale_mul", "bias"))


def test_a_published_recipe_is_that_of_the_paper(home: Path) -> None:
    config = load_run(Path(__file__).parents[2] / "configs/train/var/d16.yaml",
                      ["tokenizer=somewhere", f"data.folder={home}"])
    assert isinstance(config, VARRun)
    for name, value in VAR_PRESETS["d16"].config().items():
        assert getattr(config.model, name) == pytest.approx(value, rel=1e-5) if name == "drop_path" else \
            getattr(config.model, name) == value, name
    epoch = 1_281_167 / 768
    assert config.optim.steps / epoch == pytest.approx(200, rel=1e-3) and config.data.batch_size * 8 == 768
    assert config.optim.warmup_steps / epoch == pytest.approx(4, rel=1e-3)
    assert config.optim.lr == pytest.approx(1e-4 * 768 / 256)


def test_buckets_are_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="data.buckets"):
        VARObjective(VARRun(objective="var", **common(home, data=DataConfig(buckets=BucketConfig()))))


@pytest.mark.parametrize("changes, message", [
    ({"scales": ((1, 1), (4, 4))}, "model.scales"), ({"codebook_dim": 4}, "model.codebook_dim"),
    ({"vocab_size": 8}, "model.vocab_size"), ({"num_classes": 3}, "model.num_classes"),
])
def test_models_that_do_not_fit_the_tokenizer(home: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VARObjective(VARRun(objective="var", **common(home, model=replace(MODEL, **changes))))


def test_the_default_decoder_must_paint_by_scales(home: Path) -> None:
    with pytest.raises(ConfigError, match="write decoder: scale"):
        VARRun(objective="var", **common(home, settings=PipelineSettings(decoder="jacobi")))
