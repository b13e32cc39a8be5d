"""One evaluation on several processes: `torchrun --nproc_per_node N -m arimg eval imagenet ...`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(days=7)        # for the slowest process, which may have a whole share more to do


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def device(self, name: str) -> str:
        """"auto" and "cuda" are this process's own GPU where there are several processes."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name


@contextmanager
def all_processes() -> Iterator[Processes]:
    """As torchrun's environment says; alone without one."""
    rank, count, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if count == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(rank, count, local)
    finally:
        dist.destroy_process_group()
