"""VAR's multi-scale tokenizer: image to codes and maps of every scale and back, and the transformer's inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from arimg.accel.scale import scale_inputs
from arimg.interop.var_vae import infer_multiscale_config, multiscale_config_from_var, multiscale_from_var
from arimg.presets import square_scales
from arimg.tokenizers.multiscale import MultiscaleTokenizer, phi_of_scale
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    tokenizer, images = build(fixture), fixture["in.img"]
    space = tokenizer.space()
    codes_BL, maps = tokenizer.encode_scales(images)
    fixture.compare("out.encoder", tokenizer.encoder(images))
    fixture.compare("out.f", tokenizer.latents(images))
    fixture.compare("out.var_input", scale_inputs(space.codebook_VC[codes_BL], space))
    fixture.compare("out.decode_f_raw", tokenizer.decode(maps[-1]))
    fixture.compare("out.img_last", tokenizer.decode_codes(codes_BL, space.scales[-1]).clamp(-1, 1))
    map_BChw = None
    for k, codes_BW in enumerate(space.split(codes_BL)):
        fixture.compare(f"out.idx.{k}", codes_BW)
        fixture.compare(f"out.f_hat_encode.{k}", maps[k])
        fixture.compare(f"out.img_from_idx.{k}", tokenizer.decode(maps[k]).clamp(-1, 1))
        map_BChw = space.accumulate(map_BChw, space.codebook_VC[codes_BW], k)
        fixture.compare(f"out.ar_f_hat.{k}", map_BChw)
        if k + 1 < len(space.scales):
            cells_BWC = space.next_input(map_BChw, k + 1)
            fixture.compare(f"out.ar_next.{k}", cells_BWC.unflatten(1, space.scales[k + 1]).movedim(-1, 1))
    check_other_scales(fixture, tokenizer)


def build(fixture: Fixture) -> MultiscaleTokenizer:
    """The tokenizer of the fixture's config with its weights, whose shapes tell the same sizes."""
    z_norm = fixture.settings.get("using_znorm", False)
    config = multiscale_config_from_var({"using_znorm": z_norm, **fixture.spec["config"]})
    state = fixture.state_dict()
    inferred = infer_multiscale_config(state, config.scales)
    unseen = {name: getattr(config, name) for name in ("phis", "residual_ratio", "z_norm", "commit_beta")}
    assert config == replace(inferred, **unseen)
    assert config.phi_count == inferred.phi_count
    count = len(config.scales)
    chosen = [phi_of_scale(k, count, config.phis or count) for k in range(count)]
    assert chosen == fixture.settings.get("phi_index_per_scale", chosen)
    tokenizer = MultiscaleTokenizer(config)
    tokenizer.load_state_dict(multiscale_from_var(state))
    return tokenizer.eval()


def check_other_scales(fixture: Fixture, tokenizer: MultiscaleTokenizer) -> None:
    """`out.idx_alt.*`: the caller's own scales, square ones."""
    given = [fixture[f"out.idx_alt.{k}"] for k in range(len(fixture.outputs("idx_alt.")))]
    if not given:
        return
    scales = square_scales([math.isqrt(codes_BW.shape[1]) for codes_BW in given])
    codes_BL, _ = tokenizer.encode_scales(fixture["in.img"], scales)
    for k, codes_BW in enumerate(tokenizer.space(scales).split(codes_BL)):
        fixture.compare(f"out.idx_alt.{k}", codes_BW)
