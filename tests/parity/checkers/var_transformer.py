"""VAR's transformer: teacher-forced logits, loss, and greedy generation on the guidance ramp with the plain decoder.

A run such as greedy_cfg1p5 has the release's guidance scale 1.5, ours 2.5.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.scale import ScaleByScale, latent_map, scale_ends, scale_inputs
from arimg.accel.target import Target
from arimg.interop.var import infer_var_config
from arimg.models.base import Condition
from arimg.models.var import VARConfig, VARTransformer
from arimg.tokenizers.multiscale import MultiscaleSpace
from tests.parity.checkers.dd_var import space_of, teacher_of
from tests.parity.checkers.var_sampling_filter import number
from tests.parity.fixture import Fixture

RUN = re.compile(r"out\.(greedy_cfg([0-9p]+))\.\w+")


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    model, space = teacher_of(fixture, "var."), space_of(fixture)
    check_config(fixture, model)
    condition, codes_BL = Condition(class_ids_B=fixture["in.label"]), fixture["in.idx"]
    cells_BNC = scale_inputs(space.codebook_VC[codes_BL], space)
    torch.testing.assert_close(cells_BNC, fixture["in.var_input"])
    logits_BLV = model(cells_BNC, condition)
    fixture.compare("out.logits_cond", logits_BLV)
    fixture.compare("out.logits_uncond", model(cells_BNC, model.null(condition)))
    fixture.compare("out.loss", F.cross_entropy(logits_BLV.mT, codes_BL)[None])
    runs = {match[1]: number(match[2]) for name in fixture.outputs() if (match := RUN.fullmatch(name))}
    for run, cfg in runs.items():
        check_run(fixture, model, space, run, cfg)


def check_config(fixture: Fixture, model: VARTransformer) -> None:
    """What the weights tell about the config agrees with it."""
    inferred = VARConfig(**infer_var_config(fixture.state_dict("var."), model.config.heads))
    for name in ("vocab_size", "codebook_dim", "scales", "dim", "layers", "heads", "num_classes",
                 "shared_adaln", "l2_attention"):
        assert getattr(inferred, name) == getattr(model.config, name), name


def check_run(fixture: Fixture, model: VARTransformer, space: MultiscaleSpace, run: str, cfg: float) -> None:
    """Codes and map of the decoder, and guided logits: a scale per pass, and all finer scales in one."""
    labels_B = fixture["in.label"]
    request = DecodeRequest(Condition(class_ids_B=labels_B), space.scales[-1], torch.arange(len(labels_B)), space=space,
                            guidance=Guidance(1 + cfg), sampling=Sampling(top_k=1))
    codes_BL = ScaleByScale().decode(Target(model, request), request).codes_BL
    assert codes_BL is not None
    fixture.compare(f"out.{run}.idx", codes_BL)
    latents_BLC = space.codebook_VC[codes_BL]
    fixture.compare(f"out.{run}.f_hat", latent_map(latents_BLC, request.grid, space))
    ends, cells_BNC = scale_ends(space.scales), scale_inputs(latents_BLC, space)
    for stops in (ends[2:], ends[-1:]):
        fixture.compare(f"out.{run}.logits", guided_logits(model, request, cells_BNC, (ends[1], *stops)))


def guided_logits(model: VARTransformer, request: DecodeRequest, cells_BNC: Tensor, stops: tuple[int, ...]) -> Tensor:
    """logits_BLV of passes that end at these tokens, the first of which are those of the first scale."""
    target, prefix = Target(model, request), stops[0]
    logits = [target.start_logits()]
    for start, stop in zip(stops, stops[1:]):
        logits.append(target.read_logits(cells_BNC[:, start - prefix:stop - prefix], start))
    return torch.cat(logits, dim=1)
