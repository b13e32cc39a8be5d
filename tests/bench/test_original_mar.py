"""The parts of the bench beside MAR's own code that need no checkout of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from arimg.bench.original_mar import load_mar, sizes_of, timed_steps
from arimg.config import from_dict
from arimg.errors import InputError
from arimg.interop.mar import mar_config_from_original
from arimg.models.mar import MARConfig
from arimg.presets import MAR_PRESETS


def test_the_original_is_asked_for_the_published_size() -> None:
    config = from_dict(MARConfig, mar_config_from_original(sizes_of(MAR_PRESETS["B"])))
    assert config == MARConfig()
    assert from_dict(MARConfig, mar_config_from_original(sizes_of(MAR_PRESETS["B"], 2))).decoder_layers == 2


def test_steps_are_spread_over_the_picture() -> None:
    assert timed_steps(64) == [0, 21, 42, 63] and timed_steps(2) == [0, 1] and timed_steps(1) == [0]


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no models/mar.py; give a checkout of github.com/LTH14/mar"):
        load_mar(tmp_path)


def test_a_package_that_is_missing_is_named_and_nothing_stays_imported(tmp_path: Path) -> None:
    import sys

    for name in ("diffusion/__init__.py", "models/diffloss.py", "models/mar.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import surely_not_installed\n" if name == "models/mar.py" else "")
    with pytest.raises(InputError, match="pip install surely_not_installed"):
        load_mar(tmp_path)
    assert not {"models", "diffusion", "models.mar"} & set(sys.modules)
