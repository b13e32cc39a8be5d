"""End to end at toy size: both models of continuous tokens learn to paint along edges, and the fast decoders paint as
well along them as the sequential ones. `-s` shows the figures of docs/continuous.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from arimg.accel.continuous import Cspd, JacobiContinuous
from arimg.accel.masked import ArContinuous, Masked
from arimg.checkpoints import PipelineSettings, save_component
from arimg.control.adapter import ControlConfig
from arimg.control.canny import Canny
from arimg.data import to_images
from arimg.evals.control_metrics import canny_edges, edge_scores, extracted
from arimg.models.causal import CausalConfig
from arimg.models.diffusion_head import HeadConfig
from arimg.models.mar import MARConfig
from arimg.pipeline import Pipeline
from arimg.registry import TOKENIZERS
from arimg.train.causal import CausalControlObjective, CausalControlRun
from arimg.train.data_config import DataConfig
from arimg.train.loop import train
from arimg.train.mar import MARControlObjective, MARControlRun
from arimg.train.run import LoopConfig, OptimConfig
from tests.models.toy_continuous import nearby
from tests.train.toy_drawings import CHANNELS, GRID, KINDS, PATCH, PrincipalTokenizer, write_drawings

pytestmark = pytest.mark.slow

COUNT = 96                          # pictures per figure
HALF_A_PIXEL_STEP = 1 / 255         # of [-1, 1] in 8 bits
HEAD = HeadConfig(width=96, layers=2, steps="ddim25")     # from t = 960: a short training does not reach the end
ADAPTER = ControlConfig(embed_dim=48, depth=1, heads=4, ffn_hidden=96, patch=PATCH, stride=PATCH, dim=64, points=3,
                        types=("canny",))
# MAR learns its positions from nothing, where the causal model has rotary ones. It takes 1,000 steps to look at other
# tokens at all; until then its loss is the same whatever it is shown, and F1 is 1.8 times the shuffled one.
POSITIONS = {"*pos_embed*": 5.0, "*z_proj.bias": 5.0}


class Kind(NamedTuple):
    """One of the two models."""

    objective: Any
    run: Any
    model: Any
    plain: Any                  # the sequential decoder
    name: str                   # of that decoder
    optim: OptimConfig
    steps: int | None           # of generation


MODELS = {
    "causal": Kind(CausalControlObjective, CausalControlRun, CausalConfig(
        latent_channels=CHANNELS, grid=GRID[0], dim=64, layers=4, heads=4, ffn_hidden=160, num_classes=len(KINDS),
        dropout=0.0, inject_layers=(0, 1, 2), head=HEAD), ArContinuous(), "ar-continuous",
        OptimConfig(steps=400, lr=4e-3, warmup_steps=20), None),
    "mar": Kind(MARControlObjective, partial(MARControlRun, mask_min=0.02), MARConfig(
        latent_channels=CHANNELS, grid=GRID[0], encoder_dim=64, encoder_layers=2, encoder_heads=4, decoder_dim=64,
        decoder_layers=3, decoder_heads=4, buffer=4, num_classes=len(KINDS), attention_dropout=0.0, dropout=0.0,
        inject_encoder=(0,), inject_decoder=(0, 1), head=HEAD), Masked(), "masked",
        OptimConfig(steps=2000, lr=3e-3, warmup_steps=20, lr_scales=POSITIONS), 32),
}


@dataclass(frozen=True)
class Painted:
    """Pictures along the held-out maps."""

    pixels_NHW3: np.ndarray     # in [0, 1]
    f1_N: np.ndarray
    shuffled_N: np.ndarray      # against the map of another picture
    passes: float
    seconds: float
    figures: dict[str, Any]

    def show(self, name: str) -> None:
        print(f"\n{name}: F1 {self.f1_N.mean():.3f}, against other maps {self.shuffled_N.mean():.3f}; "
              f"{self.passes:.1f} passes, {self.seconds:.2f} s; {self.figures}")


@dataclass(frozen=True, eq=False)
class Studio:
    """A home with drawings and a tokenizer, and the models trained there."""

    home: Path
    held_NHW3: np.ndarray

    @cache
    def pipeline(self, kind: str) -> Pipeline:
        """Trained."""
        one = MODELS[kind]
        config = one.run(objective=f"{kind}-control", name=kind, tokenizer=str(self.home / "tokenizer"),
                         model=one.model, control=ADAPTER, maps="extracted", control_dropout=0.0, head_draws=2,
                         data=DataConfig(folder=str(self.home / "drawings"), batch_size=16),
                         settings=PipelineSettings(decoder=one.name), optim=one.optim,
                         train=LoopConfig(log_steps=20, ema_decay=0.98))
        return Pipeline.from_pretrained(train(config, one.objective(config)), device="cpu", dtype="float32")

    @cache
    def painted(self, kind: str, decoder: Any, batch: int = 48) -> Painted:
        """All held-out maps, picture k with seed k."""
        maps, pixels, passes, seconds, figures = extracted(self.held_NHW3, Canny()), [], [], 0.0, {}
        for start in range(0, COUNT, batch):
            rows = range(start, start + batch)
            out = self.pipeline(kind)(to_images(maps[start:start + batch]), control_type="canny", decoder=decoder,
                                      class_id=[k % len(KINDS) for k in rows], seeds=list(rows), output_type="np",
                                      steps=MODELS[kind].steps)
            pixels.append(out.images)
            passes.append(out.stats.forward_passes)
            seconds += out.stats.seconds["tokens"]
            figures = {name: value for name, value in out.stats.extra.items() if name in ("acceptance", "head_tokens")}
        edges, given = canny_edges((255 * np.concatenate(pixels)).round().astype(np.uint8)), canny_edges(self.held_NHW3)
        return Painted(np.concatenate(pixels), edge_scores(edges, given).f1,
                       edge_scores(edges, np.roll(given, 1, 0)).f1, float(np.mean(passes)), seconds, figures)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    home = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARIMG_HOME", str(home))
        patch.setitem(TOKENIZERS.entries, "PrincipalTokenizer", "tests.train.toy_drawings:PrincipalTokenizer")
        seen, held = write_drawings(home / "drawings", 900, COUNT)
        save_component(PrincipalTokenizer.fit(seen), home / "tokenizer")
        yield Studio(home, held)


@pytest.mark.parametrize("kind", MODELS)
def test_control_is_obeyed(kind: str, studio: Studio) -> None:
    painted = studio.painted(kind, MODELS[kind].plain)
    painted.show(f"{kind}, sequential")
    assert painted.f1_N.mean() >= 2 * painted.shuffled_N.mean()


@pytest.mark.parametrize("kind", MODELS)
def test_speculation_paints_as_well(kind: str, studio: Studio) -> None:
    plain = studio.painted(kind, type(MODELS[kind].plain)(last_noise=True))
    painted = studio.painted(kind, Cspd(nearby(studio.pipeline(kind).transformer, 1e-4), 3))
    plain.show(f"{kind}, sequential with last noise")
    painted.show(f"{kind}, cspd")
    assert abs(painted.f1_N.mean() - plain.f1_N.mean()) <= 0.02


@pytest.mark.parametrize("kind", MODELS)
def test_fixed_points_paint_the_same(kind: str, studio: Studio) -> None:
    """To half an 8-bit pixel step with the last tolerance."""
    plain = studio.painted(kind, MODELS[kind].plain)
    for tolerance in (1e-3, 1e-4, 2e-5):
        painted = studio.painted(kind, JacobiContinuous(8, tolerance))
        painted.show(f"{kind}, jacobi-continuous, tolerance {tolerance:g}")
        difference = np.abs(2 * (painted.pixels_NHW3 - plain.pixels_NHW3)).max()
        print(f"largest difference of a pixel in 8-bit steps: {difference * 127.5:.4f}")
    assert abs(painted.f1_N.mean() - plain.f1_N.mean()) <= 0.02
    assert difference <= HALF_A_PIXEL_STEP and painted.passes <= plain.passes
