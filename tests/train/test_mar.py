"""The objectives `mar`, `mar-control`, `causal` and `causal-control` at toy size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arimg.checkpoints import PipelineSettings, save_component
from arimg.control.adapter import ControlConfig
from arimg.errors import ConfigError, InputError
from arimg.models.base import Condition
from arimg.models.causal import CausalConfig
from arimg.models.diffusion_head import HeadConfig
from arimg.models.mar import MARConfig
from arimg.pipeline import Pipeline
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.train.causal import CausalControlObjective, CausalControlRun, CausalObjective, CausalRun
from arimg.train.codes import load_coder
from arimg.train.data_config import DataConfig
from arimg.train.latents import tokens_of
from arimg.train.loop import train
from arimg.train.mar import MARControlObjective, MARControlRun, MARObjective, MARRun, mask_ratio
from arimg.train.run import LoopConfig, OptimConfig
from tests.train.toy_emoji import write_toy_emoji

SIDE = 16                               # pixels; 4 x 4 tokens
HEAD = HeadConfig(width=16, layers=1, steps="ddim10")
MAR = MARConfig(latent_channels=2, grid=4, encoder_dim=32, encoder_layers=1, encoder_heads=2, decoder_dim=32,
                decoder_layers=2, decoder_heads=2, buffer=2, num_classes=2, inject_encoder=(0,), inject_decoder=(1,),
                head=HEAD)
CAUSAL = CausalConfig(latent_channels=2, grid=4, dim=32, layers=2, heads=2, ffn_hidden=32, num_classes=2,
                      inject_layers=(0, 1), head=HEAD)
ADAPTER = ControlConfig(embed_dim=8, depth=1, heads=2, ffn_hidden=16, patch=4, stride=4, dim=32, points=2,
                        types=("canny", "color"))
KINDS: dict[str, Any] = {"mar": (MARObjective, MARRun, MAR), "causal": (CausalObjective, CausalRun, CAUSAL)}
CONTROLLED: dict[str, Any] = {"mar": (MARControlObjective, MARControlRun, MAR),
                              "causal": (CausalControlObjective, CausalControlRun, CAUSAL)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    write_toy_emoji(tmp_path / "data" / "emoji-128", size=SIDE)
    torch.manual_seed(0)
    tokenizer = KLTokenizer(KLConfig(base_channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_channels=2,
                                     attention_levels=()))
    save_component(tokenizer, tmp_path / "tokenizer")
    return tmp_path


def objective_of(kind: str, home: Path, table: Any = KINDS, **changes: Any) -> Any:
    objective, run, model = table[kind]
    if table is CONTROLLED:
        changes = {"control": ADAPTER, **changes}
    return objective(run(**{"objective": kind, "name": "toy", "tokenizer": str(home / "tokenizer"),
                            "data": DataConfig(batch_size=6), "model": model,
                            "optim": OptimConfig(steps=30, lr=1e-2, warmup_steps=2),
                            "train": LoopConfig(log_steps=1, threads=1), **changes}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_step_and_micro(kind: str, home: Path) -> None:
    one, two = objective_of(kind, home), objective_of(kind, home)
    for step, micro in ((0, 0), (3, 1)):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(step, micro), two.batch(step, micro), strict=True))
    assert not torch.equal(one.batch(0, 0)[0], one.batch(0, 1)[0])
    tokens, masked, times, noise, classes, drop = one.batch(0, 0)
    assert tokens.shape == (6, 16, 2) and masked.dtype == drop.dtype == torch.bool and classes.shape == (6,)
    assert times.shape == (4, int(masked.sum())) and noise.shape == (*times.shape, 2)
    assert len(set(masked.sum(1).tolist())) == 1, "one ratio per batch"
    assert masked.all() if kind == "causal" else not masked.all()


def test_mask_ratios_follow_the_truncated_normal() -> None:
    rng = np.random.default_rng(0)
    ratios = np.array([mask_ratio(rng, 0.7) for _ in range(20_000)])
    assert ratios.min() >= 0.7 and ratios.max() <= 1
    assert abs(ratios.mean() - 0.867) < 0.002            # spec, section 1.4


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_masked_rows_in_the_released_formula(kind: str, home: Path) -> None:
    objective = objective_of(kind, home)
    network = objective.network.eval()
    tokens, masked, times, noise, classes, drop = objective.batch(0)
    loss, _ = network(tokens, masked, times, noise, classes, torch.zeros_like(drop))
    condition = Condition(class_ids_B=classes)
    if kind == "mar":
        z = network.transformer.context(condition, tokens, ~masked)
    else:
        z = network.transformer(tokens, condition, (4, 4))
    sums = []
    for draw in range(4):                               # all rows through the head, then masked out
        t = torch.zeros(masked.shape, dtype=torch.int64)
        full = torch.zeros_like(tokens)
        t[masked], full[masked] = (times[draw] * 1000).long(), noise[draw]
        mse, bits = network.transformer.head.losses(tokens.flatten(0, 1), z.flatten(0, 1), t.flatten(),
                                                    full.flatten(0, 1))
        sums.append(((mse + bits) * masked.flatten()).sum())
    torch.testing.assert_close(loss, torch.stack(sums).sum() / (4 * masked.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_not_read_and_dropped_classes_do_not_matter(kind: str, home: Path) -> None:
    objective = objective_of(kind, home)
    network = objective.network.eval()
    tokens, masked, times, noise, classes, drop = objective.batch(1)
    all_B, none_B = torch.ones_like(drop), torch.zeros_like(drop)
    for dropped, same in ((all_B, True), (none_B, False)):
        pair = [network.context(tokens, masked, network.transformer.drop(Condition(class_ids_B=ids), dropped), ())
                for ids in (classes, 1 - classes)]
        assert torch.equal(*pair) == same
    if kind == "mar":
        other = torch.where(masked[..., None], 9.0, tokens)
        condition = Condition(class_ids_B=classes)
        pair = [network.context(one, masked, condition, ()) for one in (other, tokens)]
        assert torch.equal(*pair)


def test_tokens_are_scaled_samples_of_the_posterior(home: Path) -> None:
    tokenizer = KLTokenizer(KLConfig(base_channels=32, multipliers=(1, 1), res_blocks=1, latent_channels=2,
                                     attention_levels=(), patch_size=2))
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    noise = torch.randn(3, 4, 8)
    want = tokenizer.encode(images, noise.mT.unflatten(2, (2, 2))).flatten(2).mT
    torch.testing.assert_close(tokens_of(tokenizer.moments(images), noise, tokenizer), want)


def test_there_are_no_codes_to_make_ahead(home: Path) -> None:
    with pytest.raises(InputError, match="holds a KLTokenizer, whose tokens are numbers"):
        load_coder(str(home / "tokenizer"))


@pytest.mark.parametrize("kind", CONTROLLED)
def test_loss_falls_with_control_and_the_export_paints(kind: str, home: Path) -> None:
    objective = objective_of(kind, home, CONTROLLED)
    before = objective.validation_loss(objective.network)
    folder = train(objective.config, objective)
    assert objective.validation_loss(objective.network) < before
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.settings.decoder == objective.config.settings.decoder and pipe.control_types == ("canny", "color")
    picture = (np.arange(SIDE) // 4 % 2 * 255).astype(np.uint8)
    stripes = np.broadcast_to(picture[:, None, None], (SIDE, SIDE, 3)).copy()
    out = pipe(control=stripes, control_type="canny", class_id=0, seeds=[0, 1])
    assert len(out.images) == 2 and out.images[0].size == (SIDE, SIDE)


@pytest.mark.parametrize("changes,message", [
    ({"head_draws": 0}, "head_draws"), ({"mask_min": 0.0}, "mask_min"), ({"token_noise": 0.5}, "token_noise"),
    ({"settings": PipelineSettings(decoder="jacobi")}, "masked"),
    ({"model": replace(MAR, latent_channels=3)}, "2; make them equal"),
    ({"model": replace(MAR, grid=5)}, "model.grid=4"),
    ({"model": replace(MAR, num_classes=3)}, "num_classes"),
])
def test_refusals(changes: dict[str, Any], message: str, home: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        objective_of("mar", home, **changes)
    assert "\n" not in str(caught.value)
