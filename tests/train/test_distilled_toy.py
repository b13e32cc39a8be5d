"""A picture in one pass instead of 64, under control, from the first picture of the data set to the student's own:
teacher, pairs, Distilled Decoding 1 and 2, and a next-scale model. Every network is trained here by the training loop,
on coloured rectangles whose maps tell the shape and never the colour."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from arimg.accel.base import Decoder, DecodeRequest
from arimg.accel.dd1 import Dd1, Schedule
from arimg.accel.dd2 import Dd2
from arimg.accel.flow import FlowSolver
from arimg.accel.scale import ScaleByScale, latent_map
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR
from arimg.checkpoints import save_component
from arimg.config import from_dict
from arimg.data import to_images, to_pixels
from arimg.evals.control_metrics import canny_edges, edge_scores
from arimg.evals.frechet import Gaussian, Moments, frechet_distance
from arimg.models.base import Condition
from arimg.pipeline import Pipeline
from arimg.registry import OBJECTIVES, TOKENIZERS
from arimg.train.loop import train
from arimg.train.pairs import PairMaker, PairsConfig, PairSet, make_pairs
from tests.train.toy_shapes import CHANNELS, GRID, PATCH, PYRAMID, PatchTokenizer, shapes, write_shapes

pytestmark = pytest.mark.slow
SOLVER, PAINTED, PAIRS, MIDDLE = FlowSolver(20), 512, 1536, 16
NETWORK = {"dim": 48, "layers": 2, "heads": 4, "num_classes": 2, "inject_layers": [0, 1]}
CONTROL = {"embed_dim": 32, "depth": 1, "heads": 4, "ffn_hidden": 64, "patch": PATCH, "stride": PATCH, "dim": 48,
           "points": 2, "types": ["canny"]}


class Scores(NamedTuple):
    """Of PAINTED pictures: F1 of their edges with those asked for, and with another picture's; distance to the data."""

    f1: float
    shuffled: float
    fd: float


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("home")
    write_shapes(root / "data" / "emoji-128")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARIMG_HOME", str(root))
        patch.setitem(TOKENIZERS.entries, "PatchTokenizer", "tests.train.toy_shapes:PatchTokenizer")
        yield root


def trained(objective: str, name: str, steps: int, lr: float, optim: dict[str, Any] | None = None,
            **more: Any) -> Path:
    """The folder that a run of the training loop exports."""
    config_class = OBJECTIVES.load(objective).config_class
    config = from_dict(config_class, {
        "objective": objective, "name": name, "train": {"log_steps": 25, "ema_decay": 0.99},
        "optim": {"steps": steps, "lr": lr, "warmup_steps": 20, "weight_decay": 0.0, **(optim or {})}, **more})
    return train(config, OBJECTIVES.load(objective)(config), "none")


@pytest.fixture(scope="module")
def teacher(home: Path) -> Path:
    """An AR transformer with control."""
    tokenizer = PatchTokenizer.fit(shapes(480, seed=0)[0])
    save_component(tokenizer, home / "patches")
    return trained("control", "teacher", 300, 4e-3, tokenizer=str(home / "patches"), data={"batch_size": 16},
                   control=CONTROL, model={
                       **NETWORK, "vocab_size": tokenizer.vocab_size, "ffn_hidden": 96, "block_size": 64,
                       "rope_prefix": "identity", "rope_grid": "true", "codebook_dim": CHANNELS, "token_dropout": 0.0,
                       "residual_dropout": 0.0, "ffn_dropout": 0.0})


@pytest.fixture(scope="module")
def pairs(home: Path, teacher: Path) -> Path:
    config = PairsConfig(PAIRS, data=str(home / "data" / "emoji-128"), solver=SOLVER, batch=128)
    make_pairs(PairMaker(Pipeline.from_pretrained(teacher, "cpu", "float32"), config), home / "pairs")
    return home / "pairs"


@pytest.fixture(scope="module")
def given(teacher: Path, pairs: Path) -> dict[str, Any]:
    """What every run of Distilled Decoding is told."""
    return {"teacher": str(teacher), "data": {"folder": str(pairs), "batch_size": 16, "held_out": 64}}


@pytest.fixture(scope="module")
def dd1(given: dict[str, Any]) -> Pipeline:
    """Teacher and student."""
    folder = trained("dd1", "dd1", 500, 3e-3, timesteps=[0, MIDDLE], **given)
    return Pipeline.from_pretrained(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def dd2(given: dict[str, Any], home: Path) -> Pipeline:
    """Teacher and generator, through both stages."""
    trained("dd2-tuning", "tuned", 300, 3e-3, head_width=64, head_depth=2, draws=2, fit_steps=300, **given)
    alone, aligned, updates = 900, 40, 300
    given = {**given, "data": {**given["data"], "batch_size": 48}}      # 16 leave the colours of some modes apart
    folder = trained("dd2", "dd2", alone + aligned + 2 * updates, 3e-3, draws=2, weight="one", pair_weight=0.5,
                     turns={"pairs_alone": alone, "align_at": alone, "align_steps": aligned, "updates_after": 2},
                     init_from=str(home / "runs" / "tuned" / "export" / "tuned"), **given, guidance={
                         "lr": 2e-3, "schedule": "constant", "weight_decay": 0.0, "warmup_steps": 20, "beta1": 0.0,
                         "beta2": 0.99})
    return Pipeline.from_pretrained(folder, "cpu", "float32")


def asked(pipe: Pipeline) -> DecodeRequest:
    """New pictures' maps and classes, seeds that no pair has."""
    pixels, classes = shapes(PAINTED, seed=1)
    maps = to_images(np.repeat(canny_edges(pixels)[..., None], 3, axis=-1).astype(np.uint8) * 255)
    space = pipe.tokenizer.space()
    with torch.no_grad():
        inject = pipe.control.inject(maps, type_ids_B=torch.zeros(PAINTED, dtype=torch.int64), scales=space.scales)
    return DecodeRequest(Condition(class_ids_B=torch.from_numpy(classes)), GRID, 10 ** 6 + torch.arange(PAINTED),
                         inject, space=space)


def painted(pipe: Pipeline, decoder: Decoder) -> tuple[Tensor, Scores]:
    """Codes, and how good the pictures are."""
    request = asked(pipe)
    result = decoder.decode(Target(pipe.transformer, request), request)
    assert result.codes_BL is not None and request.space is not None
    latents = result.latents_BLC
    latents = request.space.codebook_VC[result.codes_BL] if latents is None else latents
    return result.codes_BL, scores(pipe.tokenizer.decode(latent_map(latents, GRID, request.space)))


@torch.no_grad()
def scores(images: Tensor) -> Scores:
    """Of pictures for the maps of `asked`."""
    edges, wanted = canny_edges(to_pixels(images)), canny_edges(shapes(PAINTED, seed=1)[0])
    data = Moments.of(features(to_images(shapes(2_000, seed=2)[0])))
    own = Moments.of(features(images))
    distance = frechet_distance(own.mean_C, own.covariance_CC, Gaussian.of(data.mean_C, data.covariance_CC))
    return Scores(float(edge_scores(edges, wanted).f1.mean()),
                  float(edge_scores(edges, np.roll(wanted, 2, axis=0)).f1.mean()), distance)


def features(images: Tensor) -> np.ndarray:
    """Mean colours of a 4 x 4 grid: 48 numbers."""
    pooled: np.ndarray = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1).detach().numpy()
    return pooled


def independent(pipe: Pipeline, codes: Tensor) -> Scores:
    """The baseline of Distilled Decoding: each token by itself, from its teacher's frequencies at its position."""
    rows = torch.randint(len(codes), (PAINTED, codes.shape[1]), generator=torch.Generator().manual_seed(0))
    return scores(pipe.tokenizer.decode_codes(codes.gather(0, rows), GRID))


def codes_of(pairs: Path) -> Tensor:
    return torch.from_numpy(PairSet(pairs).rows(np.arange(PAIRS))["codes"].astype(np.int64))


def test_one_and_two_steps_of_dd1(dd1: Pipeline, pairs: Path) -> None:
    student = dd1.decoders["dd1"]
    own_codes, own = painted(dd1, FlowAR(SOLVER))
    one_codes, one = painted(dd1, Dd1(student))
    two_codes, two = painted(dd1, Dd1(student, Schedule((0, MIDDLE))))
    alone = independent(dd1, codes_of(pairs))
    agreement = [float((codes == own_codes).float().mean()) for codes in (one_codes, two_codes)]
    print(f"teacher {own}\none step {one}\ntwo steps {two}\nindependent tokens {alone}\nagreement {agreement}")
    for score in (own, one, two):
        assert score.f1 > 2 * score.shuffled and score.f1 > 0.8 * own.f1 and score.fd < alone.fd / 4
    # Both distances are the teacher's but for chance, so better means nearer to its very pictures, and to the map.
    assert agreement[1] > agreement[0] and two.f1 > one.f1


def test_one_step_of_dd2(dd2: Pipeline, pairs: Path) -> None:
    _, own = painted(dd2, FlowAR(SOLVER))
    _, one = painted(dd2, Dd2(dd2.decoders["dd2"]))
    alone = independent(dd2, codes_of(pairs))
    print(f"teacher {own}\none step {one}\nindependent tokens {alone}")
    assert one.f1 > 2 * one.shuffled and one.f1 > 0.8 * own.f1 and one.fd < alone.fd / 4


def test_control_of_a_next_scale_model(home: Path) -> None:
    tokenizer = PatchTokenizer.fit(shapes(480, seed=0)[0], PYRAMID)
    save_component(tokenizer, home / "pyramid")
    folder = trained("var-control", "var", 600, 4e-3, tokenizer=str(home / "pyramid"), data={"batch_size": 16},
                     control=CONTROL, model={**NETWORK, "vocab_size": tokenizer.vocab_size, "scales": PYRAMID,
                                             "codebook_dim": CHANNELS, "drop_path": 0.0, "gamma_init": 0.1})
    pipe = Pipeline.from_pretrained(folder, "cpu", "float32")
    codes, own = painted(pipe, ScaleByScale())
    alone = independent(pipe, codes)
    print(f"scale by scale {own}\nindependent tokens {alone}")
    assert own.f1 > 2 * own.shuffled and own.fd < min(1, alone.fd / 4)
