"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from arimg.memory import keep_freed_memory
if {keep}: keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        kept = [torch.ones(1_000_000) for _ in range(30)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_pages_are_kept() -> None:
    counts = {keep: int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True,
                                       text=True, check=True, env={}).stdout) for keep in (False, True)}
    assert counts[True] < 500 < counts[False]
