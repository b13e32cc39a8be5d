"""Tokenizer and teacher of the distillation fixtures on VAR."""

from __future__ import annotations

from arimg.interop.var import transformer_from_var, var_config_from_release
from arimg.interop.var_vae import multiscale_config_from_var, multiscale_from_var
from arimg.models.var import VARConfig, VARTransformer
from arimg.tokenizers.multiscale import MultiscaleQuantizer, MultiscaleSpace
from tests.parity.fixture import Fixture

NOT_THE_TEACHERS = ("head_width", "head_depth", "time_embedding_scale", "layerwise_n_d_embed", "note")


def space_of(fixture: Fixture) -> MultiscaleSpace:
    """Codebook and phis, under `vae.quantize.`."""
    quantizer = MultiscaleQuantizer(multiscale_config_from_var(fixture.spec["config"]))
    quantizer.load_state_dict(multiscale_from_var(fixture.state_dict("vae.quantize.")))
    return quantizer.eval().requires_grad_(False).space()


def teacher_of(fixture: Fixture, prefix: str) -> VARTransformer:
    """The teacher, under `prefix`."""
    given = {name: value for name, value in fixture.spec["config"].items() if name not in NOT_THE_TEACHERS}
    teacher = VARTransformer(VARConfig(**var_config_from_release(given)))
    teacher.load_state_dict(transformer_from_var(fixture.state_dict(prefix)))
    return teacher.eval()
