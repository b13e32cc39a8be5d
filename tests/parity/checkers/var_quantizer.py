"""VAR's multi-scale quantiser alone: every way of sharing the phis, and the released scales with their ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arimg.accel.scale import scale_inputs
from arimg.interop.var_vae import multiscale_config_from_var, multiscale_from_var
from arimg.tokenizers.multiscale import MultiscaleQuantizer, phi_of_scale
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare all outputs of each mode, or those of the one quantiser, which also decodes given codes."""
    config = dict(fixture.spec["config"])
    modes = config.pop("modes", None)
    if modes is None:
        check_released(fixture, quantizer_of(config, fixture.state_dict()))
        return
    for name, mode in modes.items():
        quantizer = quantizer_of({**config, **mode}, fixture.state_dict(f"{name}."))
        with torch.no_grad():
            through_BChw, codes_BL, losses = quantizer(fixture["in.f"])
        fixture.compare(f"out.{name}.idx", codes_BL)
        fixture.compare(f"out.{name}.f_hat", through_BChw)
        fixture.compare(f"out.{name}.vq_loss", (losses.vq + losses.commit)[None])
        fixture.compare(f"out.{name}.var_input", inputs_of(quantizer, codes_BL))


def quantizer_of(config: dict[str, Any], state: dict[str, Tensor]) -> MultiscaleQuantizer:
    """The quantiser of the original's arguments with its weights."""
    quantizer = MultiscaleQuantizer(multiscale_config_from_var(config))
    quantizer.load_state_dict(multiscale_from_var(state))
    return quantizer


@torch.no_grad()
def check_released(fixture: Fixture, quantizer: MultiscaleQuantizer) -> None:
    """Both directions, and the phi of each scale."""
    space, codes_BL = quantizer.space(), fixture["in.idx"]
    count = len(space.scales)
    chosen = [phi_of_scale(k, count, quantizer.config.phis or count) for k in range(count)]
    assert chosen == fixture.settings["phi_index_per_scale"]
    encoded_BL, maps = space.quantise(fixture["in.f"])
    fixture.compare("out.encode_idx", encoded_BL)
    fixture.compare("out.encode_f_hat", maps[-1])
    fixture.compare("out.decode_f_hat", space.maps(space.codebook_VC[codes_BL])[-1])
    fixture.compare("out.var_input", inputs_of(quantizer, codes_BL))


def inputs_of(quantizer: MultiscaleQuantizer, codes_BL: Tensor) -> Tensor:
    """What a transformer reads under teacher forcing."""
    space = quantizer.space()
    with torch.no_grad():
        return scale_inputs(space.codebook_VC[codes_BL], space)
