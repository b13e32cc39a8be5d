"""Types and extractors in general: names, options, statuses, and the rules that belong to a type."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import arimg
from arimg.control import base
from arimg.errors import InputError, UnknownNameError
from arimg.registry import CONTROLS

PACKAGE = Path(arimg.__file__).parent


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def test_every_registered_extractor_keeps_the_protocol():
    for name in CONTROLS.names():
        extractor = CONTROLS.load(name)
        assert extractor.type.name == name
        assert base.get_type(name) is extractor.type
        assert isinstance(extractor.status(), base.Status)


def test_statuses_name_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    table = {name: status for name, _, status in base.statuses()}
    assert {"canny", "color", "depth", "hed", "lineart", "map", "seg", "softedge"} <= set(table)
    assert all(table[name].ready for name in ("canny", "color", "lineart", "map", "softedge"))
    assert not table["hed"].ready and str(tmp_path) in table["hed"].detail and "pip install" in table["hed"].detail
    assert all("\n" not in status.detail for status in table.values())


def test_listing_imports_nothing_heavy():
    code = ("import sys; from arimg.control import base; base.statuses(); "
            "print([name for name in ('torch', 'cv2', 'transformers', 'diffusers', 'timm') if name in sys.modules])")
    listed = subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True)
    assert listed.strip() == "[]"


def test_map_is_used_as_it_is(photo):
    assert base.build("map")(photo).tobytes() == photo.tobytes()
    assert base.build("map")(photo.convert("L")).mode == "RGB"


def test_unknown_names_and_options_suggest_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown control type 'cany'; did you mean canny"):
        base.build("cany")
    with pytest.raises(UnknownNameError, match="did you mean lineart"):
        base.get_type("line_art")
    with pytest.raises(UnknownNameError, match="unknown option of canny 'hihg'; did you mean high"):
        base.build("canny", hihg=3)
    with pytest.raises(UnknownNameError, match="unknown option of map 'low'; known: none"):
        base.build("map", low=3)


@pytest.mark.parametrize("value", ["x", None, True, float("nan"), float("inf"), -1, 11, [], "1e999"])
def test_numbers_outside_the_range(value):
    with pytest.raises(InputError, match="size is .*; it must be a number from 0 to 10"):
        base.check_number("size", value, 0, 10)


def test_numbers_may_be_text():
    assert base.check_number("size", "2.5", 0, 10) == 2.5
    assert base.check_number("size", 10, 0, 10) == 10


def test_choices():
    assert base.check_choice("source", "photo", ["photo", "labels"]) == "photo"
    with pytest.raises(UnknownNameError, match="unknown source 'fotos'; did you mean photo"):
        base.check_choice("source", "fotos", ["photo", "labels"])


def test_large_pictures_are_scaled_down_for_networks(photo):
    assert base.at_most(photo, 40) is photo
    assert base.at_most(photo, 20).size == (20, 12)
    assert base.at_most(Image.new("RGB", (5000, 2)), 100).size == (100, 1)


def test_annotators_lie_under_home(monkeypatch):
    monkeypatch.setenv("ARIMG_HOME", "elsewhere")
    assert base.annotator_path("x.pth") == Path("elsewhere/annotators/x.pth")
    monkeypatch.delenv("ARIMG_HOME")
    assert base.annotator_path("x.pth") == Path.home() / ".cache/arimg/annotators/x.pth"


# ---------------------------------------------------------------------------------------------------------------------
# Defects of the originals (specs, section 5)


def test_defect_18_one_name_per_type_everywhere():
    """ControlAR: training called a type `segmentation`, the data set `seg`; another had no branch in sampling."""
    for name, control_type, _ in base.statuses():
        assert control_type.name == name
    with pytest.raises(UnknownNameError):
        base.get_type("segmentation")


def test_defect_18_a_photo_is_not_taken_for_a_label_map(photo):
    """ControlAR's README passed a photo as segmentation control."""
    with pytest.raises(InputError, match="one channel of class numbers"):
        base.build("seg", source="labels")(photo)


def test_defect_19_polarity_and_resize_rule_belong_to_the_type(photo):
    """ControlAR: polarity of lineart and the resampling of seg differed between scripts."""
    drawing = Image.new("RGB", (64, 64), "white")
    drawing.paste("black", (30, 8, 34, 56))
    for name in ("canny", "softedge", "lineart"):
        edges = np.array(base.build(name)(drawing))
        assert edges.max() > 100 and edges.mean() < 64, "white lines on black"
        assert base.get_type(name).background == (0, 0, 0)
    expected = {"canny": "nearest", "seg": "nearest", "hed": "bicubic", "lineart": "bicubic", "depth": "bicubic",
                "map": "bicubic", "softedge": "bicubic", "color": "nearest"}
    assert {name: base.get_type(name).resample for name in expected} == expected


def test_defect_19_label_colours_do_not_blend():
    seg = base.get_type("seg")
    colours = Image.new("RGB", (10, 10), (120, 120, 120))
    colours.paste((4, 200, 3), (5, 0, 10, 10))
    for mode in ("pad", "crop", "stretch"):
        fitted = np.array(seg.fit(colours, (32, 48), mode)).reshape(-1, 3)
        assert {tuple(colour) for colour in fitted} <= {(120, 120, 120), (4, 200, 3), (0, 0, 0)}


@pytest.mark.parametrize("name", CONTROLS.names())
def test_defect_20_extractors_say_which_options_they_take(name):
    """ControlAR's class-conditional test built its HED detector with an argument that the detector does not take."""
    with pytest.raises(UnknownNameError, match=f"unknown option of {name} 'detect_resolution'"):
        base.build(name, detect_resolution=512)


def test_defect_22_no_absolute_paths():
    """LlamaGen and ControlAR carried private paths of their authors' machines."""
    absolute = re.compile(r"""["'](/(home|root|Users|mnt|data|work|workspace|tmp|opt)\b|[A-Za-z]:\\)""")
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not absolute.search(path.read_text(encoding="utf-8")), path


def test_defect_22_options_are_not_parsed_by_truthiness():
    """`type=bool` of argparse takes every non-empty text for true; here text that is no value is refused."""
    with pytest.raises(InputError, match="canny low is 'False'"):
        base.build("canny", low="False")
