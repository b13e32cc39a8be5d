"""What cheaper arithmetic costs: the negative log-likelihood of held-out pictures' tokens, in several forms of a model.

Tokens are those of the full model's tokenizer. Every form scores the same tokens, each given the true ones before it,
under the picture's class and control map, without guidance, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from arimg.conditions import checked_type
from arimg.control.base import build
from arimg.data import to_images
from arimg.errors import InputError
from arimg.evals.bootstrap import mean_figure
from arimg.evals.control_metrics import extracted
from arimg.evals.held_out import HeldOut, bar
from arimg.evals.report import Report, versions
from arimg.pipeline import Pipeline

LAW = {"cfg": 1.0, "control_cfg": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "plausibility": 0.0}


def evaluate_nll(full: Pipeline, forms: Mapping[str, Pipeline], data: HeldOut, kind: str | None, batch: int, seed: int,
                 **more: Any) -> Report:
    """Nats per token of `full` and of each form, and by how many percent each differs from `full`.

    `kind`: control type of the maps; None = no control. Raises InputError when model and pictures do not fit, and
    UnknownNameError on a control type that the model does not know.
    """
    if data.pixels.shape[1:3] != full.settings.size:
        own = "x".join(map(str, full.settings.size))
        raise InputError(f"the pictures have {data.pixels.shape[1]}x{data.pixels.shape[2]} pixels, the model {own}; "
                         "give pictures of the model's size")
    if kind is not None:
        checked_type(kind, full.control_types)
    report = Report({"evaluation": "nll", "versions": versions(), "data": data.fingerprint, "split": data.split,
                     "pictures": data.count, "seed": seed, "control_type": kind, "options": LAW, **more})
    batches = list(_batches(full, data, kind, batch))
    pipes = {"full": full, **forms}
    scores = {name: np.concatenate([pipe.nll(codes, **options).double().mean(1).numpy()
                                    for codes, options in bar(name)(batches)]) for name, pipe in pipes.items()}
    for name, nll_N in scores.items():
        change = 100 * (float(nll_N.mean()) / float(scores["full"].mean()) - 1)
        report.add(name, {"nats per token": mean_figure(nll_N, seed), "change, %": change})
    return report


def _batches(full: Pipeline, data: HeldOut, kind: str | None, batch: int) -> Iterator[tuple[torch.Tensor, dict]]:
    """codes_BL and the options of the call, batch by batch."""
    maps_NHW3 = None if kind is None else extracted(data.chosen, build(kind))
    for start in bar("tokens")(range(0, data.count, batch)):
        pixels = data.chosen[start:start + batch]
        options: dict[str, Any] = dict(LAW)
        if maps_NHW3 is not None:
            options |= {"control": to_images(maps_NHW3[start:start + batch]), "control_type": kind}
        if data.chosen_classes is not None:
            options["class_name"] = list(data.chosen_classes[start:start + batch])
        with torch.no_grad():
            yield full.tokenizer.encode(to_images(pixels).to(full.device)).codes_BL, options
