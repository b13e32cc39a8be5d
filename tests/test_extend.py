"""docs/extend.md: its examples are installed as a foreign package and used through arimg's registries."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.target import Target
from arimg.checkpoints import load_component, save_component
from arimg.control.base import build, get_type, statuses
from arimg.errors import InputError, UnknownNameError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.registry import CONTROLS, DECODERS, TOKENIZERS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extend.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's modules and entry points as an installed distribution on sys.path."""
    text = PAGE.read_text(encoding="utf-8")
    modules = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, flags=re.DOTALL))
    assert set(modules) == {"my_control", "my_decoder", "my_tokenizer"}
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    setup = re.search(r"\[options\.entry_points\]\n(.*?)```", text, flags=re.DOTALL)
    assert setup is not None
    info = tmp_path / "my_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n", encoding="utf-8")
    groups = re.sub(r"^(\S+) =$", r"[\1]", setup[1], flags=re.MULTILINE)
    (info / "entry_points.txt").write_text(re.sub(r"^ +", "", groups, flags=re.MULTILINE), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


def test_unknown_before_it_is_installed() -> None:
    with pytest.raises(UnknownNameError, match="unknown control type 'sketch'"):
        get_type("sketch")


def test_names_are_listed_without_importing(installed: Path) -> None:
    assert "sketch" in CONTROLS.names() and "greedy" in DECODERS.names() and "PaletteTokenizer" in TOKENIZERS.names()
    assert "my_control" not in sys.modules


def test_control_type(installed: Path) -> None:
    photo = Image.new("RGB", (48, 32), "white")
    photo.paste((200, 30, 30), (12, 8, 36, 24))
    drawn = build("sketch", radius=1)(photo)
    assert (drawn.mode, drawn.size) == ("RGB", photo.size)
    assert drawn.getpixel((24, 16)) == (255, 255, 255)              # inside: no stroke
    assert max(drawn.getpixel((12, 16))) < 128                      # on the left border of the box: a dark stroke
    fitted = get_type("sketch").fit(drawn, (64, 64))
    assert fitted.size == (64, 64) and fitted.getpixel((0, 0)) == (255, 255, 255)
    assert [status.ready for name, _, status in statuses() if name == "sketch"] == [True]
    with pytest.raises(InputError, match="sketch radius"):
        build("sketch", radius=-1)
    with pytest.raises(UnknownNameError, match="did you mean radius"):
        build("sketch", radios=1)


def test_arimg_keeps_its_own_names(installed: Path) -> None:
    points = installed / "my_parts-1.0.dist-info" / "entry_points.txt"
    points.write_text("[arimg.controls]\ncanny = my_control:Sketch\n", encoding="utf-8")
    assert CONTROLS.load("canny").type.name == "canny"


def test_decoder(installed: Path) -> None:
    """Greedy equals plain decoding at temperature 0, under guidance too."""
    torch.manual_seed(0)
    config = ARConfig(vocab_size=32, dim=16, layers=2, heads=2, ffn_hidden=32, block_size=16, num_classes=4)
    network = ARTransformer(config).double().eval()
    with torch.no_grad():
        network.output.weight.normal_()
    request = DecodeRequest(Condition(class_ids_B=torch.tensor([0, 3])), grid=(3, 4), seeds_B=torch.tensor([5, 6]),
                            guidance=Guidance(cfg=2.0), sampling=Sampling(temperature=0))
    steps: list[int] = []
    found = DECODERS.load("greedy")().decode(Target(network, request), request,
                                             lambda step: steps.append(step.fixed_tokens))
    plain = PlainAR().decode(Target(network, request), request)
    assert torch.equal(found.codes_BL, plain.codes_BL)
    assert found.stats.forward_passes == 12 and steps == list(range(2, 25, 2))


def test_tokenizer(installed: Path, tmp_path: Path) -> None:
    """Flat colours survive a round trip, also after the tokenizer was saved and found again by its class name."""
    tokenizer_class = TOKENIZERS.load("PaletteTokenizer")
    config_class = importlib.import_module("my_tokenizer").PaletteConfig
    save_component(tokenizer_class(config_class(levels=3, stride=4)), tmp_path / "saved")
    tokenizer = load_component(tmp_path / "saved")
    colours_B3hw = torch.randint(-1, 2, (2, 3, 2, 3), generator=torch.Generator().manual_seed(0)).float()
    images_B3HW = colours_B3hw.repeat_interleave(4, -1).repeat_interleave(4, -2)
    encoded = tokenizer.encode(images_B3HW)
    assert encoded.grid == (2, 3) and encoded.codes_BL.shape == (2, 6) and int(encoded.codes_BL.max()) < 27
    assert torch.equal(tokenizer.decode_codes(encoded.codes_BL, encoded.grid), images_B3HW)
    assert torch.equal(encoded.latents_BChw, colours_B3hw)
