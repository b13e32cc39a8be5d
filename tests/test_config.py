"""Strict configuration: what is accepted, what is refused, and what the one line says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from arimg.config import dump_config, from_dict, load_config, to_dict
from arimg.errors import ConfigError


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 0


@dataclass(frozen=True)
class Run:
    data: Path
    optim: Optim = Optim()
    multipliers: tuple[int, ...] = (1, 2)
    compile: bool = False
    clip: float | None = 1.0
    mode: Literal["class", "text"] = "class"
    weights: dict[str, float] = field(default_factory=dict)
    stages: tuple[Optim, ...] = ()
    title: str = ""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_file_and_overrides_in_this_order(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "data: codes\noptim: {lr: 2e-4, warmup: 5}\nmultipliers: [1, 2, 4]\n")
    run = load_config(Run, path, ["optim.lr=1e-3", "clip=null", "stages=[{lr: 1}]", "title=a=b"])
    assert run == Run(data=Path("codes"), optim=Optim(lr=1e-3, warmup=5), multipliers=(1, 2, 4), clip=None,
                      stages=(Optim(lr=1.0),), title="a=b")
    assert isinstance(run.multipliers, tuple) and isinstance(run.optim.betas, tuple)


def test_round_trips(tmp_path: Path) -> None:
    run = Run(data=Path("x"), optim=Optim(lr=3e-5), weights={"lpips": 1.0}, stages=(Optim(), Optim(warmup=2)))
    assert from_dict(Run, to_dict(run)) == run
    assert to_dict(run)["multipliers"] == [1, 2]
    assert load_config(Run, write(tmp_path / "run.yaml", dump_config(run))) == run


@pytest.mark.parametrize("overrides, message", [
    (["optim.lrr=1"], "overrides: unknown key optim.lrr; did you mean optim.lr?"),
    (["zzz=1"], "unknown key zzz; known keys: data, optim, multipliers"),
    (["stages=[{lx: 1}]"], "unknown key stages[0].lx; did you mean stages[0].lr?"),
    (["optim.lr=fast"], "optim.lr = 'fast': needs a number"),
    (["optim.warmup=1.5"], "optim.warmup = 1.5: needs a whole number"),
    (["optim.warmup=true"], "optim.warmup = True: needs a whole number"),
    (["optim.lr=null"], "optim.lr = None: needs a number"),
    (["title=no"], "title = False: needs a text; YAML takes yes, no, on and off for true and false: put the text in "
                   "quotes, \"'no'\""),
    (["optim=3"], "optim = 3: needs keys of its own, those of Optim"),
    (["compile=1"], "compile = 1: needs true or false"),
    (["multipliers=3"], "multipliers = 3: needs a list"),
    (["multipliers=[1,x]"], "multipliers[1] = 'x': needs a whole number"),
    (["optim.betas=[0.9]"], "optim.betas = [0.9]: needs exactly 2 values"),
    (["clip=x"], "clip = 'x': needs a number"),
    (["mode=clas"], "mode = 'clas': choose one of class, text"),
    (["weights=3"], "weights = 3: needs keys with values"),
    (["weights.l2=x"], "weights.l2 = 'x': needs a number"),
    (["title=${oc.env:HOME}"], "title = '${oc.env:HOME}': interpolations are refused"),
    (["optim.lr"], "override 'optim.lr': write it as key=value"),
    (["=3"], "override '=3': write it as key=value"),
    (["multipliers=[1,"], "overrides: "),
])
def test_override_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, None, ["data=x", *overrides])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("data: [1\n", "is not plain YAML"),
    ("data: !!python/object/apply:os.getcwd []\n", "is not plain YAML"),
    ("- 1\n- 2\n", "holds a list or a bare value"),
    ("optim: {lr: 1}\n", "data: has no value and no default; set data=..."),
    ("data: ${oc.env:HOME}\n", "interpolations are refused"),
    ("data: x\nstages: {a: 1}\n", "stages = {'a': 1}: needs a list"),
])
def test_file_errors(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError):
            load_config(Run, tmp_path / name)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True), ("off", False),
                                             ("'False'", None), ("0", None), ("no", False), ("''", None)])
def test_defect_22_text_is_not_taken_for_true(text: str, value: bool | None) -> None:
    """argparse's `type=bool` in the originals took every text but the empty one for true."""
    if value is None:
        with pytest.raises(ConfigError, match="compile = .*: needs true or false"):
            load_config(Run, None, ["data=x", f"compile={text}"])
    else:
        assert load_config(Run, None, ["data=x", f"compile={text}"]).compile is value


def test_importing_config_imports_no_torch() -> None:
    code = "import arimg.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
