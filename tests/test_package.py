"""The house around the code: metadata, pinned versions, shipped files, start-up time, and pages that tell the truth."""

from __future__ import annotations

import ast
import configparser
import re
import resource
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

import arimg

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTED_EXTRAS = ("text", "control", "eval", "train", "dev")
HELP_SECONDS = 0.3


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(value: str) -> list[str]:
    return [line for line in value.splitlines() if line]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=540)


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def test_pyproject_only_names_the_build_system() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert len(lines(text)) == 3 and text.startswith("[build-system]")


def test_tested_requirements_are_pinned_and_the_pins_fit(setup: configparser.ConfigParser) -> None:
    pins = dict(line.split("==") for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8"))
                if not line.startswith("#"))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    wanted = lines(setup["options"]["install_requires"])
    for extra in TESTED_EXTRAS:
        wanted += lines(setup["options.extras_require"][extra])
    for requirement in map(Requirement, wanted):
        if requirement.name == "arimg":
            assert requirement.extras <= set(setup["options.extras_require"])
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{requirement.name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not admit {pins[name]}"


def test_missing_extras_named_in_errors_exist(setup: configparser.ConfigParser) -> None:
    extras = set(setup["options.extras_require"])
    for path in (ROOT / "arimg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingExtraError":
                named = node.args[0]
                if isinstance(named, ast.Constant):
                    assert named.value in extras, f"{path}:{node.lineno}: there is no extra {named.value!r}"


def test_console_script_is_callable(setup: configparser.ConfigParser) -> None:
    name, target = lines(setup["options.entry_points"]["console_scripts"])[0].split(" = ")
    module, attribute = target.split(":")
    assert name == "arimg"
    assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_assets(tmp_path: Path) -> None:
    """Built from a copy: setuptools leaves a build folder behind."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "arimg", source / "arimg", ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("arimg-*.whl")
    assert wheel.name.startswith(f"arimg-{arimg.__version__}-")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "arimg").rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}
    assert wanted <= inside, sorted(wanted - inside)
    assert any(name.endswith("licenses/NOTICE") for name in inside)


# ---------------------------------------------------------------------------------------------------------------------
# Start-up


def test_help_is_quick_and_free_of_torch() -> None:
    """Processor time of the best of five runs: wall time on a busy machine measures the neighbours."""
    code = ("import sys; from arimg.cli import main; sys.argv = ['arimg', '--help']\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python("-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "sample" in done.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < HELP_SECONDS, seconds


def test_sample_needs_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    code = ("import sys; from arimg.cli import main\n"
            f"sys.argv = ['arimg', 'sample', '--control', 'examples/canny.png', '-o', {str(picture)!r}]\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
            "heavy = {'diffusers', 'transformers', 'accelerate'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def commands(page: Path) -> list[list[str]]:
    """Every `arimg ...` line of the page's code blocks, joined over backslashes, split as a shell does."""
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [shlex.split(line.lstrip("$ "), comments=True) for line in text.splitlines()
            if line.lstrip("$ ").startswith("arimg ")]


def test_pages_show_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_on_pages_exist(page: Path) -> None:
    from arimg.cli import main

    for words in commands(page):
        named = [word for word in words[2:3] if not word.startswith("-")]       # a sub-command
        done = CliRunner().invoke(main, [words[1], *named, "--help"])
        assert done.exit_code == 0, f"{page.name}: {' '.join(words)}: {done.output}"
        for word in words[2:]:
            option = word.split("=")[0]
            if re.fullmatch(r"--?[a-z][-a-z0-9]*", option):
                known = re.search(rf"(^|[\s,/]){re.escape(option)}\b", done.output)
                assert known, f"{page.name}: {' '.join(words)}: there is no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_on_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_readme_names_real_make_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named <= targets


def test_ci_runs_what_the_makefile_offers() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^make lint test slow ", script, flags=re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
