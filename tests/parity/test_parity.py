"""Every fixture in the folder that ARIMG_PARITY_DIR names (default: tests/data/parity) against its checker."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest

from tests.parity import fixture as fixtures

FOLDER = Path(os.environ.get("ARIMG_PARITY_DIR", Path(__file__).parents[1] / "data" / "parity"))

CHECKERS = {    # the longest prefix of the fixture's name decides
    "llamagen_vq": "llamagen_vq",
    "llamagen_patchgan": "llamagen_patchgan",
    "llamagen_rope2d": "llamagen_rope2d",
    "llamagen_sampling": "llamagen_sampling",
    "llamagen_gpt": "llamagen_gpt",
    "controlar_": "controlar",
    "var_vqvae": "var_vqvae",
    "var_quantizer": "var_quantizer",
    "var_transformer": "var_transformer",
    "var_sampling_filter": "var_sampling_filter",
    "mar_kl_vae": "mar_kl_vae",
    "mar_schedules": "mar_schedules",
    "mar_transformer": "mar_transformer",
    "mar_head": "mar_head",
    "mar_head_sampling": "mar_head_sampling",
    "mar_loss": "mar_loss",
    "mar_generate": "mar_generate",
    "cspd_processor": "cspd_processor",
    "cspd_exact_toy": "cspd_exact_toy",
    "cspd_run_upstream": "cspd_run_upstream",
    "dd1_flow_ode": "dd1_flow_ode",
    "dd1_toy_joint": "dd1_toy_joint",
    "dd1_llamagen_student": "dd1_llamagen_student",
    "dd1_var_student": "dd1_var_student",
    "dd1_var_teacher_involved": "dd1_var_teacher_involved",
    "dd2_teacher_score": "dd2_teacher_score",
    "dd2_losses": "dd2_losses",
    "dd2_generator_llamagen": "dd2_generator_llamagen",
    "dd2_generator_var": "dd2_generator_var",
}


def family(name: str) -> str | None:
    """The checker of the longest prefix of `name`."""
    found = max((prefix for prefix in CHECKERS if name.startswith(prefix)), key=len, default=None)
    return None if found is None else CHECKERS[found]


def test_there_are_fixtures() -> None:
    assert list(FOLDER.glob("*.safetensors")), f"no .safetensors in {FOLDER}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    checker = family(path.stem)
    assert checker is not None, f"no checker for {path.stem}; known prefixes: {', '.join(CHECKERS)}"
    fixture = fixtures.load(path)
    import_module(f"tests.parity.checkers.{checker}").check(fixture)
    fixture.assert_complete()
    for name, error in sorted(fixture.errors.items()):
        print(f"{path.stem:32s} {name:48s} {error:.2e}")
