"""Every model of continuous tokens x control x decoder paints; all else is answered in one line."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from arimg.errors import ArimgError, CheckpointError
from arimg.models.base import order_of
from arimg.pipeline import Pipeline
from arimg.registry import CONTROL_MODULES, DECODERS, MODELS, TOKENIZERS
from tests.models.toy_continuous import nearby, toy_mar
from tests.test_walk import MODELS as DISCRETE
from tests.test_walk import control_map
from tests.test_walk import pipeline as discrete_pipeline
from tests.toy import CONTROL, SIDE, toy_pipeline
from tests.toy_continuous import PLAIN, toy_continuous_pipeline

KINDS = ("masked", "causal")
CONTROL_TYPES = (None, "canny", "depth")            # a type is a name to these models; the others are in test_walk
NAMES = tuple(name for name in DECODERS.names() if order_of(DECODERS.load(name)) == "continuous")
WRONG = {("masked", "ar-continuous"), ("causal", "masked"), ("causal", "cspd-relaxed")}
COMBINATIONS = tuple(combination for combination in product(KINDS, CONTROL_TYPES, NAMES)
                     if (combination[0], combination[2]) not in WRONG)


def test_the_walk_covers_every_registered_decoder() -> None:
    assert NAMES == ("ar-continuous", "cspd", "cspd-relaxed", "jacobi-continuous", "masked")
    assert len(COMBINATIONS) == 3 * (4 + 3)


@cache
def pipeline(model: str, control_type: str | None) -> Pipeline:
    pipe = toy_continuous_pipeline(model, None if control_type is None else replace(CONTROL, types=(control_type,)))
    pipe.decoders = {"cspd": nearby(pipe.transformer)}
    return pipe


def test_every_registered_network_is_walked() -> None:
    """Those of this walk, of test_walk and, on other runtimes, of tests/backends, by class."""
    pipes = [*(pipeline(kind, "canny") for kind in KINDS), *(discrete_pipeline(kind, "canny") for kind in DISCRETE)]
    walked = {type(part).__name__ for pipe in pipes for part in pipe.components.values()}
    exported = {f"{runtime}{part}" for runtime in ("Onnx", "Openvino") for part in ("Transformer", "Tokenizer")}
    assert walked | exported == {*TOKENIZERS.names(), *MODELS.names(), *CONTROL_MODULES.names()}


def call(model: str, control_type: str | None, decoder: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"n": 2, "seed": 3, "class_id": 1, "cfg": 2.0, "lossy": True}
    if str(decoder).startswith("cspd"):
        given["window"] = 2
    if control_type is not None:
        given |= {"control": control_map(), "control_type": control_type, "control_cfg": 1.5}
    return pipeline(model, control_type)(decoder=decoder, **{**given, **options})


@pytest.mark.parametrize("model,control_type,name", COMBINATIONS)
def test_legal(model: str, control_type: str | None, name: str) -> None:
    out = call(model, control_type, name)
    assert len(out.images) == 2 and out.images[0].size == (SIDE, SIDE) and out.codes is None
    assert out.latents.shape == (2, 4, 4, 4) and out.latents.isfinite().all()
    assert out.stats.extra["guarantee"] == DECODERS.load(name)().guarantee
    alone = call(model, control_type, name, n=1, seed=4)
    torch.testing.assert_close(alone.latents[0], out.latents[1], rtol=1e-9, atol=1e-9)
    if name == "jacobi-continuous":
        plain = call(model, control_type, PLAIN[model])
        assert (out.latents - plain.latents).abs().max() < 0.05


def test_the_default_decoder_and_a_folder(tmp_path: Any) -> None:
    for model in KINDS:
        pipe = pipeline(model, "canny")
        again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / model), dtype="float32").to(torch.float64)
        options: dict[str, Any] = {"control": control_map(), "control_type": "canny", "class_id": 0, "seed": 5}
        ours, theirs = (one(**options).latents for one in (pipe, again))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_given_latents_are_painted_around() -> None:
    given = torch.full((4, 4, 4), torch.nan)
    given[:, :2] = 0.25
    for model in KINDS:
        out = call(model, None, PLAIN[model], forced_latents=given)
        assert torch.equal(out.latents[:, :, :2], torch.full_like(out.latents[:, :, :2], 0.25))
        assert (out.latents[0, :, 2:] - out.latents[1, :, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize("model,options", [
    ("masked", {"decoder": "jacobi"}), ("masked", {"decoder": "ar-continuous"}), ("causal", {"decoder": "masked"}),
    ("causal", {"decoder": "cspd-relaxed"}), ("causal", {"steps": 3}), ("masked", {"decoder": "dd1"}),
    ("masked", {"verify": True}),
    ("masked", {"decoder": "cspd-relaxed", "lossy": False}),
    ("masked", {"steps": 0}), ("masked", {"top_k": 5}), ("masked", {"top_p": 0.5}), ("masked", {"audit": True}),
    ("masked", {"forced": [0] * 16}), ("masked", {"forced_latents": torch.zeros(4, 3, 4)}), ("masked", {"window": 3}),
    ("masked", {"class_id": None, "prompt": "a cat"}), ("causal", {"size": (32, 32)}), ("masked", {"size": (32, 32)}),
    ("causal", {"temperature": -1.0}),
])
def test_illegal(model: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArimgError) as caught:
        call(model, None, **{"decoder": PLAIN[model], **options})
    assert "\n" not in str(caught.value)


def test_codes_and_latents_do_not_mix() -> None:
    discrete = toy_pipeline()
    with pytest.raises(ArimgError, match="continuous"):
        discrete(decoder="masked", class_id=0)
    with pytest.raises(ArimgError, match="forced_latents"):
        discrete(forced_latents=torch.zeros(4, 4, 4), class_id=0)
    with pytest.raises(CheckpointError, match="numbers per token"):
        Pipeline(discrete.tokenizer, toy_mar())
    with pytest.raises(CheckpointError, match="numbers per token: 4 in the tokenizer, 2"):
        Pipeline(pipeline("masked", None).tokenizer, toy_mar(latent_channels=2))
