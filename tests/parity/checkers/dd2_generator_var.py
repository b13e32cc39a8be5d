"""DD2's generator and guidance network on VAR, and what the teacher says of generated tokens."""

from __future__ import annotations

import torch

from arimg.accel import flow
from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.dd2 import shifted
from arimg.accel.target import Target
from arimg.interop.var import transformer_from_var, var_config_from_release
from arimg.models.base import Condition
from arimg.models.generators import VARGenerator, VARGeneratorConfig
from tests.parity.checkers.dd2_generator_llamagen import OURS, check_passes
from tests.parity.checkers.dd_var import space_of, teacher_of
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    network, space, settings = build(fixture), space_of(fixture), fixture.settings
    request = DecodeRequest(Condition(class_ids_B=fixture["in.label"]), network.config.scales[-1],
                            torch.arange(len(fixture["in.label"])), guidance=Guidance(1 + settings["cfg"]),
                            sampling=Sampling(top_k=settings["top_k"], top_p=settings.get("top_p") or 1.0), space=space)
    fixture.compare("out.noise_input", shifted(fixture["in.noise"], space))
    tokens_BLC = check_passes(fixture, network, request)
    target = Target(teacher_of(fixture, "teacher."), request)
    p_BLV = torch.cat([target.start(), target.read(shifted(tokens_BLC, space), network.first)], dim=1)
    fixture.compare("out.teacher_probs", p_BLV)
    x_BLC = fixture["out.x_t"].double()
    fixture.compare("out.teacher_velocity", flow.velocity(x_BLC, fixture["in.t"].double(), p_BLV.double().log(),
                                                          space.codebook_VC.double()))


def build(fixture: Fixture) -> VARGenerator:
    """The network of the fixture's config with its weights."""
    given = fixture.spec["config"]
    config = var_config_from_release({name: value for name, value in given.items() if name not in OURS})
    network = VARGenerator(VARGeneratorConfig(**config, head_width=given["head_width"], head_depth=given["head_depth"],
                                              time_scale=given["time_embedding_scale"]))
    state = transformer_from_var(fixture.state_dict())
    network.load_state_dict({key: tensor for key, tensor in state.items() if key.startswith(("backbone.", "head."))})
    return network.eval()
