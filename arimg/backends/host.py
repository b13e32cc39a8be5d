"""What the parts of an exported pipeline have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from arimg.backends.runtimes import Graph, load_graph
from arimg.errors import CheckpointError, InputError


class Exported(nn.Module):
    """Tables that the host reads, and a graph in the same folder. It stays in float32 on the CPU; the graph is loaded
    by `open_graph` and cannot be written."""

    runtime = ""
    graph_name = ""

    def __init__(self) -> None:
        super().__init__()
        self._graph: Graph | None = None

    def open_graph(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Load the graph beside the weights; `dtype` bfloat16 lets OpenVINO multiply in it. Raises MissingExtraError
        and CheckpointError."""
        self._graph = load_graph(self.runtime, folder, self.graph_name, dtype or torch.float32)

    @property
    def graph(self) -> Graph:
        """The loaded graph."""
        assert self._graph is not None, "open_graph comes first"
        return self._graph

    def _apply(self, fn: Any, recurse: bool = True) -> "Exported":
        trial = fn(torch.empty(0))
        if trial.device.type != "cpu" or trial.dtype != torch.float32:
            raise InputError(f"an exported model runs in float32 on the CPU, not in {trial.dtype} on "
                             f"{trial.device.type}; take the model that it was exported from")
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(f"{folder}: an exported model is not written again; copy its folder")
