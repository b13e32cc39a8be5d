"""Freed memory stays with the process."""

from __future__ import annotations

import resource
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
        torch.ones({floats})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
FLOATS = 10_000_000
PAGES = 10 * FLOATS * 4 // resource.getpagesize()       # that a call of `faults` writes


def _faults(keep: bool) -> int:
    code = FAULTS.format(keep=keep, floats=FLOATS)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={}).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_pages_are_kept() -> None:
    assert _faults(keep=False) > 0.9 * PAGES
    assert _faults(keep=True) < 0.01 * PAGES
