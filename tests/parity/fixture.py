"""One parity fixture: weights, inputs and outputs of an original implementation, and how to compare with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

NOT_MATCHED = ("informative", "statistical")


@dataclass
class Fixture:
    """`spec` is the JSON, `tensors` the safetensors file. `errors` holds the largest absolute difference per output."""

    name: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return self.spec.get("settings", {})

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The `sd.<prefix>` tensors under their original keys."""
        start = f"sd.{prefix}"
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    def outputs(self, start: str = "") -> list[str]:
        """Names `out.<start>...` that must be matched."""
        return [name for name, rule in self.spec["compare"].items()
                if name.startswith(f"out.{start}") and rule["mode"] not in NOT_MATCHED]

    def compare(self, name: str, got: Tensor, resolution: Tensor | None = None) -> None:
        """Assert that `got` equals the stored output `name` by the rule of the JSON's `compare` field. `resolution` is
        what rounding alone may move each value by, where that is more than the rule allows."""
        want, rule = self.tensors[name], self.spec["compare"][name]
        assert tuple(got.shape) == tuple(want.shape), f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        where = torch.ones_like(want, dtype=torch.bool)
        if "where" in rule:
            mask = self.tensors[rule["where"]].bool()           # may lack the last axes
            where = mask.view(*mask.shape, *(1,) * (want.ndim - mask.ndim)).expand_as(want)
        if "dtype" in rule:
            wanted_dtype = getattr(torch, rule["dtype"])
            assert got.dtype == wanted_dtype, f"{name}: computed in {got.dtype}, expected {wanted_dtype}"
        exact = rule["mode"] == "exact"
        assert exact or rule["mode"] == "close", f"{name}: unknown mode {rule['mode']!r}"
        error = (got.detach().double() - want.double()).abs()
        limit = torch.zeros_like(error) if exact else rule.get("atol", 0) + rule.get("rtol", 0) * want.double().abs()
        if resolution is not None:
            limit = torch.maximum(limit, resolution.double())
        bad = where & ~((error <= limit) | (got.detach().double() == want.double()))
        worst = float(error[where].max()) if where.any() else 0.0
        self.errors[name] = max(worst, self.errors.get(name, 0.0))
        assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} values differ, the worst by {worst:.3g}"

    def assert_complete(self) -> None:
        """Assert that every output with a rule was compared."""
        missing = [name for name in self.outputs() if name not in self.errors]
        assert not missing, f"never compared: {', '.join(missing)}"


def load(path: Path) -> Fixture:
    """The pair `path` (.safetensors) and its .json."""
    spec = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return Fixture(path.stem, spec, load_file(path))
