"""Whether samples obey their control images: the protocol on held-out pictures, and on maps from elsewhere.

Sample k is painted with seed S + k, along the map and with the class of held-out picture k. Every score compares the
edges of a sample (canny, 100 and 200) with those of the picture whose map it was given; for canny maps that is the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arimg import images
from arimg.conditions import checked_type
from arimg.control.base import Extractor as MapExtractor
from arimg.control.base import build, get_type
from arimg.errors import InputError
from arimg.evals.bootstrap import Figure, mean_figure
from arimg.evals.control_metrics import (Region, canny_edges, check_map_scores, edge_scores, extracted, lines_of_maps,
                                         map_scores)
from arimg.evals.extractors import Extractor, metric_name
from arimg.evals.held_out import HeldOut, bar, protocol
from arimg.evals.painter import Painter
from arimg.evals.picture_sets import PictureSet, distances, features_of, fingerprint_of, picture_files
from arimg.evals.report import Report, settled_options, versions
from arimg.evals.styles import StyleJudge
from arimg.evals.tokenizer_metrics import reconstruct
from arimg.pipeline import Pipeline

STRENGTHS = (0.0, 0.5, 1.0)
CONTROL_GUIDANCE = (1.0, 2.0, 3.0)
TOP, LEFT, RIGHT = Region(bottom=0.5), Region(right=0.5), Region(left=0.5)
HALVES = ("canny", "lineart")       # types on the left and on the right


@dataclass
class HeldOutControl:
    """One evaluation of a pipeline on held-out pictures; what several measurements need is made once."""

    painter: Painter
    data: HeldOut
    kind: str                       # control type
    extractor: Extractor
    report: Report
    map_options: Mapping[str, str]  # of the extractor of control images

    @cached_property
    def edges(self) -> np.ndarray:
        """edges_NHW of the originals."""
        return canny_edges(self.data.chosen)

    @cached_property
    def samples(self) -> np.ndarray:
        """The samples at the options given."""
        return self.paint("samples", [(self.kind, self.maps(self.kind))])

    @cached_property
    def reconstructions(self) -> np.ndarray:
        """The originals through the tokenizer and back."""
        pipe = self.painter.pipe
        return reconstruct(pipe.tokenizer, self.data.chosen, pipe.device, bar("reconstructions"))

    @cached_property
    def reference(self) -> PictureSet:
        """Features of all held-out originals."""
        return self.features(self.data.pixels, "held-out originals")

    @cached_property
    def map_extractor(self) -> MapExtractor:
        """Of the control type that is measured; networks are loaded once."""
        return build(self.kind, **self.map_options)

    @cached_property
    def own_maps(self) -> np.ndarray:
        """maps_NHW3 of the originals, of the type that is measured."""
        return extracted(self.data.chosen, self.map_extractor)

    def maps(self, kind: str) -> np.ndarray:
        """maps_NHW3 of the originals."""
        return self.own_maps if kind == self.kind else extracted(self.data.chosen, build(kind))

    def paint(self, title: str, controls: Sequence[tuple[str, np.ndarray]], **options: Any) -> np.ndarray:
        """Samples of the chosen pictures' classes."""
        return self.painter(title, controls, self.data.chosen_classes, **options)

    def features(self, pixels_NHW3: np.ndarray, name: str) -> PictureSet:
        """Features, with a progress bar."""
        return features_of(pixels_NHW3, self.extractor, name, bar(f"features of {name}"))

    def score(self, name: str, pixels_NHW3: np.ndarray, region: Region = Region()) -> None:
        """Report the edges of pictures against those of the originals."""
        self.report.add(name, _scores(canny_edges(pixels_NHW3), self.edges, self.painter.seed, region))


def evaluate_control(painter: Painter, data: HeldOut, kind: str, extractor: Extractor, sweep: bool = False,
                     halves: bool = False, judge: StyleJudge | None = None,
                     map_options: Mapping[str, str] | None = None, **more: Any) -> Report:
    """Edges, maps and distances of samples and of reconstructions; on demand the sweep over strength, control guidance
    and control end, the half-and-half pictures, and the styles as `judge` sees them.

    `map_options`: of the extractor of control images. Raises InputError when pipeline and data do not fit,
    UnknownNameError on an unknown control type or class, CheckpointError where an extractor lacks its weights.
    """
    check_size(painter.pipe, data)
    for name in (kind, *(HALVES if halves else ())):
        checked_type(name, painter.pipe.control_types)
    check_map_scores(kind)
    map_options = map_options or {}
    report = Report(protocol("control", data, extractor, painter.seed, control_type=kind, map_options=dict(map_options),
                             options=settled_options(painter.pipe, painter.options), **more))
    run = HeldOutControl(painter, data, kind, extractor, report, map_options)
    _basic(run)
    _distances(run)
    if sweep:
        _sweep(run)
    if halves:
        _halves(run)
    if judge is not None:
        report.protocol["style_extractor"] = judge.extractor.describe()
        _styles(run, judge)
    return report


def evaluate_maps(painter: Painter, folder: Path, kind: str, count: int, class_name: str | None = None,
                  **more: Any) -> Report:
    """Edges of `count` samples along the maps of a folder, taken in turn, against the lines of the maps.

    Raises InputError on a folder without pictures.
    """
    files = picture_files(folder)
    size, map_type = painter.pipe.settings.size, get_type(kind)
    fitted = [np.asarray(map_type.fit(images.load_image(path, "map"), size)) for path in files]
    which = np.arange(count) % len(files)
    maps_NHW3 = np.stack(fitted)[which]
    report = Report({"evaluation": "control maps", "versions": versions(), "maps": [path.name for path in files],
                     "data": fingerprint_of(files), "pictures": count, "seed": painter.seed, "control_type": kind,
                     "class": class_name, "options": settled_options(painter.pipe, painter.options), **more})
    pixels = painter("samples", [(kind, maps_NHW3)], None if class_name is None else [class_name] * count)
    painted, given = canny_edges(pixels), lines_of_maps(maps_NHW3, kind)
    report.add("samples", _scores(painted, given, painter.seed))
    if len(files) > 1:
        shuffled = lines_of_maps(np.stack(fitted), kind)[(which + 1) % len(files)]
        report.add("shuffled maps", _scores(painted, shuffled, painter.seed))
        report.ratio("f1", "samples", "shuffled maps")
    for index, path in enumerate(files[:count]):
        report.add(path.name, _scores(painted[which == index], given[which == index], painter.seed))
    return report


def edge_figures(pixels_NHW3: np.ndarray, originals_NHW3: np.ndarray, seed: int) -> dict[str, Figure]:
    """The edges of pictures against those of the originals."""
    return _scores(canny_edges(pixels_NHW3), canny_edges(originals_NHW3), seed)


def _scores(painted: np.ndarray, given: np.ndarray, seed: int, region: Region = Region()) -> dict[str, Figure]:
    scores = edge_scores(painted, given, region)
    return {name: mean_figure(values, seed) for name, values in scores._asdict().items()}


def _basic(run: HeldOutControl) -> None:
    """Samples, reconstructions of the same originals, and samples against the map of another picture."""
    run.score("samples", run.samples)
    run.score("reconstructions", run.reconstructions)
    if run.kind != "canny":
        for name, pixels in (("samples", run.samples), ("reconstructions", run.reconstructions)):
            found = extracted(pixels, run.map_extractor)
            run.report.add(name, map_scores(run.kind, found, run.maps(run.kind), run.painter.seed))
    others = np.roll(run.edges, 1, axis=0)
    run.report.add("shuffled maps", _scores(canny_edges(run.samples), others, run.painter.seed))
    run.report.ratio("f1", "samples", "reconstructions")
    run.report.ratio("f1", "samples", "shuffled maps")


def _distances(run: HeldOutControl) -> None:
    """Distances to all held-out originals; those of the chosen originals show how much the small number adds."""
    seed = run.painter.seed
    for name, pixels in (("samples", run.samples), ("reconstructions", run.reconstructions)):
        run.report.add(name, distances(run.features(pixels, name), run.reference, seed))
    originals = replace(run.reference, features=run.reference.features.first(run.data.count))
    run.report.add("originals", distances(originals, run.reference, seed))
    run.report.ratio(metric_name("fid", run.extractor.name), "samples", "reconstructions")


def _sweep(run: HeldOutControl) -> None:
    control = [(run.kind, run.maps(run.kind))]
    for strength in STRENGTHS:
        run.score(f"strength {strength:g}", run.paint(f"strength {strength:g}", control, control_scale=strength))
    for guidance in CONTROL_GUIDANCE:
        name = f"control guidance {guidance:g}"
        run.score(name, run.paint(name, control, control_cfg=guidance))
    run.score("top half, control to the end", run.samples, TOP)
    run.score("top half, control end 0.5", run.paint("control end 0.5", control, control_end=0.5), TOP)


def _halves(run: HeldOutControl) -> None:
    """Two types, each in its half of the picture, against each type alone on the whole picture."""
    both = []
    for kind, region in zip(HALVES, (LEFT, RIGHT)):
        maps_NHW3 = run.maps(kind)
        half_NHW3 = np.broadcast_to(np.array(get_type(kind).background, np.uint8), maps_NHW3.shape).copy()
        region.of(half_NHW3)[...] = region.of(maps_NHW3)
        both.append((kind, half_NHW3))
    together = run.paint("half and half", both)
    for (kind, _), region, side in zip(both, (LEFT, RIGHT), ("left", "right")):
        alone = run.samples if kind == run.kind else run.paint(f"{kind} alone", [(kind, run.maps(kind))])
        run.score(f"{side} half, {kind} alone", alone, region)
        run.score(f"{side} half, half and half", together, region)
        run.report.ratio("f1", f"{side} half, half and half", f"{side} half, {kind} alone")


def _styles(run: HeldOutControl, judge: StyleJudge) -> None:
    """What share of pictures shows the style of its class: held-out originals, their reconstructions, samples, and
    samples painted along a map of one style with the class of another."""
    chosen = run.data.chosen_classes
    assert run.data.class_names is not None and chosen is not None, "a data set with styles has classes"
    swapped = [judge.other_style(name) for name in chosen]
    foreign = run.painter("other style", [(run.kind, run.maps(run.kind))], swapped)
    for name, pixels, class_names in (("all held-out originals", run.data.pixels, run.data.class_names),
                                      ("reconstructions", run.reconstructions, chosen),
                                      ("samples", run.samples, chosen),
                                      ("samples of another style", foreign, swapped)):
        right = judge.right(pixels, class_names, name)
        run.report.add(name, {probe: mean_figure(right_N, run.painter.seed) for probe, right_N in right.items()})
    run.score("samples of another style", foreign)


def check_size(pipe: Pipeline, data: HeldOut) -> None:
    """Raises InputError when the model paints another size than the data set has."""
    size = data.pixels.shape[1:3]
    if tuple(pipe.settings.size) != size:
        height, width = pipe.settings.size
        raise InputError(f"the model paints {height}x{width} pixels and the data set has {size[0]}x{size[1]}; make one "
                         f"of that size with: arimg data emoji --size {height}")
