"""A report: figures by set and metric, and the full protocol they were measured by."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isnan, nan
from pathlib import Path
from typing import Any

from arimg import __version__
from arimg.evals.bootstrap import Figure
from arimg.evals.extractors import sha256_of

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "timm", "torch-fidelity",
            "torchmetrics")


@dataclass
class Report:
    """`results[set][metric]`: a Figure, or a plain number without an interval. `ratios`: one number each."""

    protocol: dict[str, Any]
    results: dict[str, dict[str, Figure | float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Put figures beside those that the set `name` has already."""
        self.results.setdefault(name, {}).update(figures)

    def value(self, name: str, metric: str) -> float:
        """The number itself."""
        found = self.results[name][metric]
        return found.value if isinstance(found, Figure) else found

    def ratio(self, metric: str, name: str, other: str) -> None:
        """Note by which factor `metric` of the set `name` exceeds that of `other`."""
        below = self.value(other, metric)
        self.ratios[f"{metric}: {name} / {other}"] = self.value(name, metric) / below if below else float("nan")

    def as_json(self) -> dict[str, Any]:
        """JSON-able; an interval is [low, high] of the central 95 %; a number that does not exist is null."""
        results = {name: plain_figures(figures) for name, figures in self.results.items()}
        return {"protocol": self.protocol, "results": results,
                "ratios": {name: _number(value) for name, value in self.ratios.items()}}

    def as_markdown(self) -> str:
        """One row per set, one column per metric, then the ratios."""
        metrics = list(dict.fromkeys(metric for figures in self.results.values() for metric in figures))
        rows = [["", *metrics], ["---"] * (len(metrics) + 1)]
        rows += [[name, *(_cell(figures.get(metric)) for metric in metrics)] for name, figures in self.results.items()]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        lines = "".join(f"\n- {name}: {value:.3g}" for name, value in self.ratios.items())
        return f"{table}\n{lines}" if lines else table


def _number(value: float) -> float | None:
    return None if isnan(value) else value


def plain_figures(figures: Mapping[str, Figure | float]) -> dict[str, Any]:
    """JSON-able figures of one set."""
    return {metric: _plain(found) for metric, found in figures.items()}


def figure_from_json(found: Mapping[str, Any]) -> Figure | float:
    """The inverse of `plain_figures`, for one figure."""
    value, *interval = (nan if number is None else number for number in (found["value"], *found.get("interval", ())))
    return Figure(value, *interval) if interval else value


def _plain(found: Figure | float) -> Any:
    if isinstance(found, Figure):
        return {"value": _number(found.value), "interval": [_number(found.low), _number(found.high)]}
    return {"value": _number(found)}


def _cell(found: Figure | float | None) -> str:
    if found is None:
        return ""
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]" if isinstance(found, Figure) else f"{found:.4g}"


def versions() -> dict[str, str]:
    """Of arimg, Python and the packages that figures depend on."""
    found = {"arimg": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:                        # for example OpenCV under another name
            found[name] = "not installed under this name"
    return found


def settled_options(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a pipeline's calls, the model's defaults, precision and kind of device included."""
    names = ("decoder", "cfg", "control_cfg", "guidance_order", "plausibility", "temperature", "top_k", "top_p")
    defaults = {name: getattr(pipe.settings, name) for name in names}
    return {**defaults, "painted_size": list(pipe.settings.size), **options,
            "dtype": str(pipe.dtype).removeprefix("torch."), "device": pipe.device.type}


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file below a model folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}
