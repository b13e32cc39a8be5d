"""DD2's generator and guidance network on LlamaGen: features, velocities, one-step and AR-diffusion samples."""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest
from arimg.accel.dd2 import ar_diffusion, shifted
from arimg.interop.llamagen import ar_config_from_llamagen
from arimg.models.base import Condition
from arimg.models.generators import ARGenerator, ARGeneratorConfig
from arimg.tokenizers.vq import VQSpace
from arimg.train.dd_losses import noised
from tests.parity.fixture import Fixture

OURS = ("codebook_dim", "head_width", "head_depth", "time_embedding_scale")
EULER_STEPS = re.compile(r"(\d+) uniform Euler steps")      # in the description of the AR-diffusion sampler's tokens


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    network, condition = build(fixture), Condition(class_ids_B=fixture["in.label"])
    grid = (isqrt(network.config.block_size),) * 2
    space = VQSpace(torch.zeros(1, network.latent_dim))         # a raster; its vectors are not asked for
    request = DecodeRequest(condition, grid, torch.arange(condition.rows), space=space)
    check_passes(fixture, network, request)
    read_BNC = shifted(fixture["in.noise"], space)
    null = network.backbone.null(condition)
    fixture.compare("out.features_null", network.features(read_BNC, null, grid))
    steps = EULER_STEPS.search(fixture.spec["tensors"]["out.ar_diffusion_tokens"]["meaning"])
    assert steps is not None
    fixture.compare("out.ar_diffusion_tokens", ar_diffusion(network, fixture["in.noise"], request, int(steps[1])))


def build(fixture: Fixture) -> ARGenerator:
    """The network of the fixture's config with its weights."""
    given = fixture.spec["config"]
    config = ar_config_from_llamagen({name: value for name, value in given.items() if name not in OURS})
    network = ARGenerator(ARGeneratorConfig(**config, latent_dim=given["codebook_dim"], head_width=given["head_width"],
                                            head_depth=given["head_depth"], time_scale=given["time_embedding_scale"]))
    network.load_state_dict(fixture.state_dict())
    return network.eval()


def check_passes(fixture: Fixture, network: Any, request: DecodeRequest) -> Tensor:
    """Compare one pass as generator and one as guidance network on its tokens, which are returned."""
    noise_BLC, t_BL1, where = fixture["in.noise"], fixture["in.t"], (request.condition, request.grid)
    space = request.space
    assert space is not None
    feature_BLD = network.features(shifted(noise_BLC, space), *where)
    fixture.compare("out.features", feature_BLD)
    fixture.compare("out.velocity", network.velocity(noise_BLC, torch.ones_like(t_BL1), feature_BLD))
    tokens_BLC: Tensor = network(shifted(noise_BLC, space), noise_BLC, *where)
    fixture.compare("out.tokens", tokens_BLC)
    feature_BLD = network.features(shifted(tokens_BLC, space), *where)
    fixture.compare("out.guidance_features", feature_BLD)
    x_BLC = noised(tokens_BLC, t_BL1, fixture["in.noise2"])
    if "out.x_t" in fixture:
        fixture.compare("out.x_t", x_BLC)
    fixture.compare("out.guidance_velocity", network.velocity(x_BLC, t_BL1, feature_BLD))
    return tokens_BLC
