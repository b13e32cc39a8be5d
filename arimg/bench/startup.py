"""Where the time of one `arimg sample` goes, from the command to the file: `arimg bench startup`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arimg.bench.machine import markdown_table, median
from arimg.errors import InputError

IMPORTS = {"python": "pass", "import torch": "import torch", "import arimg": "import arimg.pipeline"}
STAGES = ("control", "tokens", "pixels")


@dataclass(frozen=True)
class Stage:
    """Medians; what a stage takes by itself."""

    name: str
    seconds: float
    cpu_seconds: float | None           # user and system time of all threads; None where only the clock is known


@dataclass(frozen=True)
class StartupReport:
    """What `arimg bench startup` measures."""

    command: tuple[str, ...]
    turns: int
    stages: tuple[Stage, ...]           # the last one is the whole


def bench_startup(arguments: Sequence[str], turns: int) -> StartupReport:
    """Run `arimg sample` with these arguments in fresh processes, and beside it programs that only import. One more
    turn warms the disk's cache. Raises InputError when sampling fails."""
    laps: dict[str, list[tuple[float, float]]] = {}
    painting: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        json_path = Path(folder) / "stats.json"
        sample = ("-m", "arimg", "sample", *arguments, "-o", str(Path(folder) / "out.png"), "--json", str(json_path))
        programs = {name: ("-c", code) for name, code in IMPORTS.items()} | {"whole": sample}
        for turn in range(1 + turns):
            for name, program in programs.items():
                lap = _lap(program)
                if turn:
                    laps.setdefault(name, []).append(lap)
            if turn:
                painting.append(json.loads(json_path.read_text(encoding="utf-8"))["seconds"])
    wall, cpu = ({name: median(lap[kind] for lap in own) for name, own in laps.items()} for kind in (0, 1))
    stages = [Stage("python", wall["python"], cpu["python"])]
    for name, before in (("import torch", "python"), ("import arimg", "import torch")):
        stages.append(Stage(name, wall[name] - wall[before], cpu[name] - cpu[before]))
    stages += [Stage(name, median(one[name] for one in painting), None) for name in STAGES]
    rest = wall["whole"] - sum(stage.seconds for stage in stages)
    stages += [Stage("command line, weights, files", rest, None), Stage("whole", wall["whole"], cpu["whole"])]
    return StartupReport(("arimg", "sample", *arguments), turns, tuple(stages))


def _lap(program: Sequence[str]) -> tuple[float, float]:
    """(seconds, processor seconds) of a fresh interpreter."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise InputError((done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("arimg: error: "))
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def to_markdown(report: StartupReport) -> str:
    """The report as a page."""
    rows = [[stage.name, f"{stage.seconds:.2f}", "" if stage.cpu_seconds is None else f"{stage.cpu_seconds:.2f}"]
            for stage in report.stages]
    return "\n\n".join([f"# Where the time of `{' '.join(report.command)}` goes",
                        f"Medians of {report.turns} fresh processes, after one that warmed the disk's cache.",
                        markdown_table(["", "s", "CPU s"], rows)])
