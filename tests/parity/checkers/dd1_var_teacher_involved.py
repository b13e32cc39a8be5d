"""A VAR teacher that draws some scales anew after a given prefix, as between two passes of DD1's student."""

from __future__ import annotations

import torch

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.dd1 import resampled
from arimg.accel.scale import scale_ends, scale_inputs
from arimg.accel.target import Target
from arimg.models.base import Condition
from tests.parity.checkers.dd_var import space_of, teacher_of
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare the block-causal outputs."""
    settings, space, teacher = fixture.settings, space_of(fixture), teacher_of(fixture, "var.")
    scales = teacher.config.scales
    ends, first, stop = scale_ends(scales), settings["start"], settings["end"]
    request = DecodeRequest(Condition(class_ids_B=fixture["in.label"]), scales[-1],
                            torch.arange(len(fixture["in.label"])), guidance=Guidance(1 + settings["cfg"]),
                            sampling=Sampling(top_k=settings["top_k"], top_p=settings["top_p"] or 1.0), space=space)
    prefix_BLC = space.codebook_VC[fixture["in.idx"]]
    tokens_BLC = resampled(Target(teacher, request), prefix_BLC, ends, first, stop)
    fixture.compare("out.block_causal.sequence", tokens_BLC[:, :ends[stop]])
    target = Target(teacher, request)
    logits_BLV = torch.cat([target.start_logits(), target.read_logits(scale_inputs(tokens_BLC, space), ends[1])], dim=1)
    fixture.compare("out.block_causal.logits", logits_BLV[:, ends[first]:ends[stop]])
