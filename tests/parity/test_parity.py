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
}
PENDING = {     # families whose models are not in the package yet
    "var_": "next-scale prediction",
    "dd1_": "Distilled Decoding 1",
    "dd2_": "Distilled Decoding 2",
    "mar_": "masked autoregression",
    "cspd_": "continuous speculative decoding",
}


def family(name: str, table: dict[str, str]) -> str | None:
    """The entry of the longest prefix of `name`."""
    found = max((prefix for prefix in table if name.startswith(prefix)), key=len, default=None)
    return None if found is None else table[found]


def test_there_are_fixtures() -> None:
    assert list(FOLDER.glob("*.safetensors")), f"no .safetensors in {FOLDER}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    pending = family(path.stem, PENDING)
    if pending is not None:
        pytest.skip(f"pending: {pending}")
    checker = family(path.stem, CHECKERS)
    assert checker is not None, f"no checker for {path.stem}; known prefixes: {', '.join([*CHECKERS, *PENDING])}"
    fixture = fixtures.load(path)
    import_module(f"tests.parity.checkers.{checker}").check(fixture)
    fixture.assert_complete()
    for name, error in sorted(fixture.errors.items()):
        print(f"{path.stem:32s} {name:48s} {error:.2e}")
