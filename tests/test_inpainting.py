"""Inpainting and outpainting of pictures with continuous tokens, as docs/continuous.md shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arimg.images import to_tensor
from tests.toy import SIDE
from tests.toy_continuous import toy_continuous_pipeline

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.mark.parametrize("model", ["masked", "causal"])
@pytest.mark.parametrize("free", [(slice(1, 3), slice(1, 3)), (slice(None), slice(2, None))],
                         ids=["hole", "right half"])
def test_what_is_given_stays_and_the_rest_is_painted(model: str, free: Any) -> None:
    pipe = toy_continuous_pipeline(model)
    with torch.no_grad():
        photo_Chw = pipe.tokenizer.encode(to_tensor(PHOTO)[None].double())[0]
    known_Chw = photo_Chw.clone()
    known_Chw[:, *free] = torch.nan
    out = pipe(class_id=1, forced_latents=known_Chw, seeds=[0, 1])
    given_hw = ~known_Chw[0].isnan()
    for latents_Chw in out.latents:
        assert torch.equal(latents_Chw[:, given_hw], photo_Chw[:, given_hw]) and latents_Chw.isfinite().all()
    assert (out.latents[0] - out.latents[1])[:, ~given_hw].abs().amax(0).min() > 1e-6
    assert (out.latents[0] - photo_Chw)[:, ~given_hw].abs().amax(0).min() > 1e-6
    assert out.stats.forward_passes <= 16 if model == "causal" else out.stats.forward_passes == int((~given_hw).sum())
