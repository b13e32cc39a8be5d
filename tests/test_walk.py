"""Every model x control x decoder that fits together paints; every combination that does not is answered in one line.

Parts that are registered later walk along: a new name in a registry either works here, or this file has to say why not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.accel.find import orders_of, second_network
from arimg.accel.verify import FlowAR, FlowScales
from arimg.control.base import build, get_type
from arimg.errors import ArimgError
from arimg.pipeline import Pipeline
from arimg.registry import CONTROLS, DECODERS
from tests.toy import CONTROL, STRIDE, toy_pipeline
from tests.toy_decoders import with_students
from tests.toy_scales import toy_scales_pipeline

SIDE = 4 * STRIDE                                   # 16 tokens
MODELS = ("class", "text", "scales")                # ARTransformer by its conditioning; VARTransformer
LOSSY = ("dd1", "dd2", "gsd", "zipar", "scale-smooth")
SAME_CODES = ("ar", "jacobi", "scale")
CONTROL_TYPES = (None, *CONTROLS.names())
ORDERS = {"class": "raster", "text": "raster", "scales": "scales"}
PLAIN = {"raster": "ar", "scales": "scale"}         # the oracle of each order
BY_ORDER: dict[str, tuple[str, ...]] = {
    order: tuple(name for name in DECODERS.names() if order in orders_of(DECODERS.load(name))) for order in PLAIN}
ONE_STEP = tuple(name for name in BY_ORDER["raster"] if second_network(DECODERS.load(name)))
COMBINATIONS = tuple((model, control_type, decoder) for model, control_type in product(MODELS, CONTROL_TYPES)
                     for decoder in BY_ORDER[ORDERS[model]])
CAPTION = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def test_the_walk_covers_every_registered_part() -> None:
    assert BY_ORDER["raster"] == ("ar", "dd1", "dd2", "gsd", "jacobi", "scd", "scd-gumbel", "scd-siblings", "sjd",
                                  "zipar")
    assert BY_ORDER["scales"] == ("dd1", "dd2", "scale", "scale-smooth") and ONE_STEP == ("dd1", "dd2")
    assert CONTROLS.names() == ("canny", "color", "depth", "hed", "lineart", "map", "seg", "softedge")
    assert len(COMBINATIONS) == 2 * 9 * 10 + 9 * 4


@cache
def pipeline(model: str, control_type: str | None) -> Pipeline:
    control = None if control_type is None else replace(CONTROL, types=(control_type,))
    if model == "scales":
        return with_students(toy_scales_pipeline(torch.float64, control=control))
    return with_students(toy_pipeline(torch.float64, control=control, conditioning=model))


def call(model: str, trained: str | None, decoder: Any, **options: Any) -> Any:
    """A call of the pipeline whose control component, if any, was trained on one type."""
    condition: dict[str, Any] = {"prompt_embeds": CAPTION} if model == "text" else {"class_id": 1}
    if trained is not None:
        condition |= {"control": control_map(), "control_type": trained}
    options = {"lossy": decoder in LOSSY, "n": 2, "seed": 3, "size": (SIDE, SIDE), **condition, **options}
    return pipeline(model, trained)(decoder=decoder, **options)


def control_map() -> Image.Image:
    stripes = (np.arange(SIDE) // 4 % 2 * 255).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(stripes[:, None, None], (SIDE, SIDE, 3)).copy())


@cache
def plain_codes(model: str, control_type: str | None) -> torch.Tensor:
    codes: torch.Tensor = call(model, control_type, PLAIN[ORDERS[model]]).codes
    return codes


@pytest.mark.parametrize("model,control_type,decoder", COMBINATIONS)
def test_legal(model: str, control_type: str | None, decoder: str) -> None:
    out = call(model, control_type, decoder)
    assert len(out.images) == 2 and out.images[0].size == (SIDE, SIDE)
    assert out.codes.shape == plain_codes(model, control_type).shape and int(out.codes.min()) >= 0
    assert out.stats.forward_passes <= out.codes.shape[1]
    assert (out.stats.extra["guarantee"] == "none") == (decoder in LOSSY)
    if decoder in SAME_CODES:
        assert torch.equal(out.codes, plain_codes(model, control_type))
    alone = call(model, control_type, decoder, n=1, seed=4)
    assert torch.equal(alone.codes[0], out.codes[1]), "a picture depends on its own seed alone"


@pytest.mark.parametrize("model,control_type,decoder", list(product(MODELS, (None, "canny"), ONE_STEP)))
def test_one_step_codes_are_verified(model: str, control_type: str | None, decoder: str) -> None:
    oracle = FlowScales() if model == "scales" else FlowAR()
    out = call(model, control_type, decoder, verify=True, lossy=False)
    assert torch.equal(out.codes, call(model, control_type, oracle, lossy=False).codes)
    assert out.stats.extra["guarantee"] == "tolerance"
    assert not torch.equal(out.codes, call(model, control_type, decoder).codes), "an untrained network guesses badly"


@pytest.mark.parametrize("model,decoder", [(model, decoder) for model in MODELS for decoder in BY_ORDER[ORDERS[model]]])
def test_illegal_everywhere(model: str, decoder: str) -> None:
    wrong_condition = {"class_id": 1} if model == "text" else {"prompt_embeds": CAPTION}
    cases: list[dict[str, Any]] = [
        {"control": control_map(), "control_type": "canny"},            # this pipeline takes no control
        {"n": 0}, {"temperature": -1.0}, {"cfg": float("nan")}, {"window": 0}, {"window": "wide"},
    ]
    if decoder in LOSSY:
        cases.append({"lossy": False})
    if decoder in ("ar", "scale", "scale-smooth", *ONE_STEP):
        cases.append({"window": 4})
    if decoder == "zipar":
        cases.append({"window": "auto"})
    for case in cases:
        one_line(model, None, decoder, **case)
    with pytest.raises(ArimgError):
        pipeline(model, None)(decoder=decoder, lossy=True, **wrong_condition)


def test_illegal_control() -> None:
    for control_type, other in product(CONTROLS.names(), CONTROLS.names()):
        if other != control_type:
            one_line("class", control_type, "jacobi", control_type=other)
    one_line("class", "canny", "jacobi", control_type="cany")
    one_line("class", None, "jacoby")


@pytest.mark.parametrize("model,decoder", list(product(MODELS, DECODERS.names())))
def test_decoders_of_another_order_are_refused(model: str, decoder: str) -> None:
    if decoder not in BY_ORDER[ORDERS[model]]:
        one_line(model, None, decoder)


def one_line(model: str, trained: str | None, decoder: str, **options: Any) -> None:
    with pytest.raises(ArimgError) as caught:
        call(model, trained, decoder, **options)
    assert "\n" not in str(caught.value)


def test_extractors_without_weights_feed_the_pipeline() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    for name in ("canny", "color", "softedge", "map"):
        assert build(name)(photo).size == (SIDE, SIDE)
        out = pipeline("class", name)(control_from=photo, control_type=name, decoder="jacobi")
        assert len(out.images) == 1 and get_type(name).name == name
