"""The other commands, the help pages, and what they import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from arimg import __version__
from arimg.cli import COMMANDS, main
from arimg.images import load_image
from tests.toy import toy_folder

ROOT = Path(__file__).resolve().parents[2]


def arimg(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": str(ROOT), "PATH": ""})


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("data", "emoji")])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    page = arimg(*command, "--help").stdout
    assert "Example: arimg" in page
    assert all(name in page for name in (COMMANDS if not command else ()))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_list_of_commands_tells_what_they_say(name: str) -> None:
    assert arimg(name, "--help").stdout.startswith(f"Usage: arimg {name}")


def test_version() -> None:
    assert arimg("--version").stdout == f"arimg, version {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    loaded = python("-c", "import sys, click, arimg.cli\n"
                    "arimg.cli.main(['sample', '--help'], standalone_mode=False)\n"
                    "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'cv2', 'omegaconf'}\n"
                    "print(heavy & set(sys.modules))")
    assert loaded.stdout.endswith("set()\n"), loaded


def test_sampling_imports_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "toy")
    done = python("-c", "import sys, arimg.cli\n"
                  f"arimg.cli.main(['sample', '--model', {str(folder)!r}, '-o', {str(tmp_path / 'x.png')!r}], "
                  "standalone_mode=False)\nprint({'diffusers', 'transformers'} & set(sys.modules))")
    assert done.stdout.endswith("set()\n"), done


def test_control(tmp_path: Path) -> None:
    photo = np.full((20, 30, 3), 100, np.uint8)
    photo[5:15, 8:22] = 140
    Image.fromarray(photo).save(tmp_path / "photo.png")
    out = str(tmp_path / "map.png")
    assert arimg("control", "canny", str(tmp_path / "photo.png"), "-o", out).stdout == f"{out}\n"
    usual = np.array(load_image(out))
    arimg("control", "canny", str(tmp_path / "photo.png"), "-o", out, "-O", "low=500", "-O", "high=1000")
    assert usual.any() and usual.shape == (20, 30, 3) and not np.array(load_image(out)).any()


def test_control_checks_the_type_before_the_photo(tmp_path: Path) -> None:
    assert "unknown control type 'photo.jpg'" in arimg("control", "photo.jpg", "canny", code=2).stderr


def test_control_list() -> None:
    lines = arimg("control", "--list").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["canny", "color", "depth", "hed", "lineart", "map", "seg", "softedge"]
    assert all(line.split()[1] in ("ready", "missing") for line in lines)
    assert lines[0].split()[1] == "ready"


def test_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import arimg.checkpoints as checkpoints
    folder = toy_folder(tmp_path / "toy")
    info = checkpoints.ModelInfo("toy", folder, checkpoints.read_index(folder).settings, 1_500_000)
    monkeypatch.setattr(checkpoints, "list_models", lambda: [info])
    page = arimg("models").stdout
    assert page.startswith("toy: toy (16x16 pixels, 1.5 MB)\n") and "controls  canny" in page and "cat, dog" in page
    monkeypatch.setattr(checkpoints, "list_models", lambda: [])
    assert arimg("models").stdout == ""


def test_convert_passes_everything_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import arimg.interop.convert as interop
    calls: list[tuple[Any, ...]] = []

    def convert(*given: Any, notify: Any, **options: Any) -> str:
        calls.append((given, options))
        notify("left out freqs_cis")
        return "there"
    monkeypatch.setattr(interop, "convert", convert)
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8")
    result = arimg("convert", "--from", "llamagen", "a.pt", "b.pt", "-o", "there", "--preset", "B",
                   "--image-size", "384", "--class-names", str(tmp_path / "names.txt"), "--weights", "ema",
                   "--dtype", "bf16", "--text-encoder", "t5")
    assert (result.stdout, result.stderr) == ("there\n", "arimg: left out freqs_cis\n")
    (given, options), = calls
    assert given == ("llamagen", ("a.pt", "b.pt"), "there")
    assert options["class_names"] == ("cat", "dog") and options["preset"] == "B" and options["image_size"] == 384
    assert options["weights"] == "ema" and options["text_encoder"] == "t5" and str(options["dtype"]) == "torch.bfloat16"


def test_data_emoji(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import arimg.train.emoji as emoji
    monkeypatch.setattr(emoji, "build_emoji", lambda out, source, size: Path(json.dumps([str(out), str(source), size])))
    monkeypatch.setenv("ARIMG_HOME", str(tmp_path))
    own = arimg("data", "emoji", "--size", "64").stdout
    assert json.loads(own) == [str(tmp_path / "data" / "emoji-64"), "None", 64]
    given = arimg("data", "emoji", "--source", str(tmp_path), "--out", "d").stdout
    assert json.loads(given) == ["d", str(tmp_path), 128]


def test_train(monkeypatch: pytest.MonkeyPatch) -> None:
    import arimg.train.launch as launch
    monkeypatch.setattr(launch, "main", lambda path, overrides, resume: [str(path), *overrides, resume])
    result = arimg("train", "x.yaml", "optim.steps=5", "name=y", "--resume", "z")
    assert result.stdout == "['x.yaml', 'optim.steps=5', 'name=y', 'z']\n"


def test_export_names_its_choices(tmp_path: Path) -> None:
    for wrong in (("--runtime", "onyx"), ("--runtime", "onnx", "--weights", "int9")):
        message = arimg("export", *wrong, "-o", str(tmp_path / "out"), code=2).stderr
        assert message.startswith("arimg: error: unknown") and "did you mean" in message
    assert not (tmp_path / "out").exists()
