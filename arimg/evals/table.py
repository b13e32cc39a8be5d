"""The whole evaluation of a model in one table: its tokenizer, its classes alone, every decoder, every control type.

A row is written to disk when it is measured, so that an interrupted run goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from arimg.control.base import build
from arimg.errors import ArimgError, InputError
from arimg.evals.control import check_size, edge_figures
from arimg.evals.control_metrics import check_map_scores, extracted, map_scores
from arimg.evals.extractors import Extractor
from arimg.evals.held_out import HeldOut, bar, protocol
from arimg.evals.painter import Painted, Painter
from arimg.evals.picture_sets import PictureSet, distances, features_of
from arimg.evals.report import Report, figure_from_json, plain_figures, settled_options
from arimg.evals.tokenizer import HeldOutPictures, Judges, evaluate_tokenizer
from arimg.images import replacing
from arimg.registry import DECODERS

BEGIN, END = "<!-- arimg eval all: begin -->", "<!-- arimg eval all: end -->"
PLAIN = "ar"
Figures = dict[str, Any]


@dataclass
class Table:
    """The rows of one model on one choice of held-out pictures."""

    painter: Painter
    data: HeldOut
    extractor: Extractor

    def __post_init__(self) -> None:
        """Raises InputError when pipeline and data do not fit, MissingExtraError before the long work."""
        check_size(self.painter.pipe, self.data)
        for kind in self.painter.pipe.control_types:
            check_map_scores(kind)

    def protocol(self) -> dict[str, Any]:
        """What every row was measured by."""
        return protocol("all", self.data, self.extractor, self.painter.seed,
                        options=settled_options(self.painter.pipe, self.painter.options))

    def rows(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        """(name, measurement)."""
        yield "tokenizer", self._tokenizer
        yield "originals", self._originals
        yield "classes alone", self._classes
        kinds = self.painter.pipe.control_types
        for kind in kinds:
            yield f"control {kind}", partial(self._control, kind)
        for name in DECODERS.names() if kinds else ():
            yield f"decoder {name}", partial(self._decoder, kinds[0], name)

    def _tokenizer(self) -> Figures:
        judges = Judges(self.extractor, reference=self.reference)
        originals = HeldOutPictures(self.data, self.painter.seed)
        report = evaluate_tokenizer(self.painter.pipe.tokenizer, originals, judges, self.painter.seed, bar("tokenizer"))
        kept = ("psnr", "psnr_mask", "ssim", "usage", "f1", "precision", "recall")
        found = report.results["reconstructions"]
        return {name: value for name, value in found.items() if name in kept or name.endswith(self.extractor.name)}

    def _originals(self) -> Figures:
        """The distance that remains because the pictures are few."""
        chosen = replace(self.reference, features=self.reference.features.first(self.data.count))
        return distances(chosen, self.reference, self.painter.seed)

    def _classes(self) -> Figures:
        return self._judged(self._paint("classes alone", None))

    def _control(self, kind: str) -> Figures:
        painted = self._paint(kind, kind)
        figures = self._judged(painted) | edge_figures(painted.pixels_NHW3, self.data.chosen, self.painter.seed)
        if kind != "canny":
            found = extracted(painted.pixels_NHW3, build(kind))
            figures |= map_scores(kind, found, self._map(kind), self.painter.seed)
        return figures

    def _decoder(self, kind: str, name: str) -> Figures:
        """Along the first control type; `as_ar`: the share of pictures that are those of the plain decoder."""
        painted = self._paint(name, kind, decoder=name, lossy=True)
        figures: Figures = {**edge_figures(painted.pixels_NHW3, self.data.chosen, self.painter.seed),
                            **self._judged(painted)}
        if self.plain is not None:
            figures["as_ar"] = float((painted.pixels_NHW3 == self.plain).all((1, 2, 3)).mean())
        return figures

    def _judged(self, painted: Painted) -> Figures:
        features = features_of(painted.pixels_NHW3, self.extractor, "samples", bar("features of samples"))
        return distances(features, self.reference, self.painter.seed) | {
            "forward_passes": painted.forward_passes, "seconds_per_picture": painted.seconds / self.data.count}

    def _paint(self, title: str, kind: str | None, **options: Any) -> Painted:
        controls = [] if kind is None else [(kind, self._map(kind))]
        return self.painter.paint(title, self.data.count, controls, self.data.chosen_classes, **options)

    @cached_property
    def reference(self) -> PictureSet:
        """Features of all held-out originals."""
        return features_of(self.data.pixels, self.extractor, "held-out originals", bar("features of originals"))

    @cached_property
    def plain(self) -> np.ndarray | None:
        """What the plain decoder paints along the first control type; None for models that it does not fit."""
        try:
            return self._paint(PLAIN, self.painter.pipe.control_types[0], decoder=PLAIN).pixels_NHW3
        except ArimgError:
            return None

    def _map(self, kind: str) -> np.ndarray:
        return extracted(self.data.chosen, build(kind))


def evaluate_all(table: Table, folder: Path, **more: Any) -> Report:
    """Measure the rows that `folder` does not hold yet. Decoders that do not fit the model are listed, with the reason,
    under "left_out"."""
    report = Report({**table.protocol(), **more, "left_out": {}})
    folder.mkdir(parents=True, exist_ok=True)
    for name, measure in table.rows():
        path = folder / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            row = _measured(measure, optional=name.startswith("decoder "))
            with replacing(path) as stream:
                stream.write(json.dumps(row, indent=2).encode())
        row = json.loads(path.read_bytes())
        if "left_out" in row:
            report.protocol["left_out"][name] = row["left_out"]
        else:
            report.add(name, {metric: figure_from_json(found) for metric, found in row.items()})
    return report


def _measured(measure: Callable[[], Figures], optional: bool) -> dict[str, Any]:
    try:
        return plain_figures(measure())
    except ArimgError as error:
        if not optional:
            raise
        return {"left_out": str(error)}


def work_folder(home: Path, table: Table, weights: dict[str, str]) -> Path:
    """The default place of the rows: the same for the same measurement."""
    identity = json.dumps([table.protocol(), weights], sort_keys=True)
    return home / "evals" / f"all-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def as_page(report: Report, command: str) -> str:
    """The command that made the report, one table for each kind of row, and what is left out."""
    groups: dict[str, Report] = {}
    for name, figures in report.results.items():
        kind = name.split()[0] if name.startswith(("control ", "decoder ")) else "model"
        groups.setdefault(kind, Report({})).add(name, figures)
    left_out = [f"- left out: {name} ({reason})" for name, reason in report.protocol["left_out"].items()]
    tables = [group.as_markdown() for group in groups.values()]
    return "\n\n".join([f"`{command}`", *tables, *(["\n".join(left_out)] if left_out else [])])


def write_markdown(path: Path, text: str) -> None:
    """A new file, or the part of an existing one between the lines BEGIN and END. Raises InputError when a file is
    there without them: it is not overwritten."""
    check_markdown(path)
    if path.exists():
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"
    else:
        text = f"{text}\n"
    with replacing(path) as stream:
        stream.write(text.encode())


def check_markdown(path: Path) -> None:
    """Raises InputError when `write_markdown` would."""
    if path.exists():
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        if not begin or END not in rest:
            raise InputError(f"--markdown {path}: exists without the lines {BEGIN} and {END}; add them where the table "
                             "goes, or name a new file")
