"""The held-out split of a data set, and what a tokenizer makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from arimg.data import EmojiSet
from arimg.errors import InputError
from arimg.evals.bootstrap import mean_figure
from arimg.evals.control_metrics import canny_edges, edge_scores
from arimg.evals.picture_sets import Extractor, distances, features_of
from arimg.evals.report import Report, versions
from arimg.evals.tokenizer_metrics import masked_psnr, perplexity, psnr, reconstruct, usage


@dataclass(frozen=True)
class HeldOut:
    """All held-out pictures of a data set, in an order that the seed decides; `count` of them are used."""

    pixels: np.ndarray              # (N, S, S, 3) uint8, all held-out pictures
    class_names: list[str]          # (N,)
    count: int
    fingerprint: str

    @property
    def chosen(self) -> np.ndarray:
        """The pictures that are used."""
        return self.pixels[:self.count]


def held_out(emoji: EmojiSet, count: int | None, seed: int = 0) -> HeldOut:
    """`count` held-out pictures; None = all. Raises InputError on a count that the split does not have."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(emoji.held_out))
    count = len(order) if count is None else count
    if not 2 <= count <= len(order):
        raise InputError(f"-n {count}: the data set holds out {len(order)} pictures; give a number from 2 to that")
    names = [emoji.class_names[label] for label in emoji.labels[order]]
    return HeldOut(np.ascontiguousarray(emoji.images[order]), names, count, emoji.fingerprint)


def bar(title: str) -> Callable[[Iterable], Iterable]:
    """A progress bar on stderr around an iteration."""
    def wrap(items: Iterable) -> Any:
        return tqdm(items, desc=title, file=sys.stderr, leave=False)
    return wrap


def protocol(what: str, data: HeldOut, extractor: Extractor, seed: int, **more: Any) -> dict[str, Any]:
    """What every report on held-out pictures says of its making."""
    return {"evaluation": what, "versions": versions(), "data": data.fingerprint, "split": "held_out",
            "reference_pictures": len(data.pixels), "pictures": data.count, "seed": seed,
            "extractor": extractor.describe(), **more}


def evaluate_tokenizer(tokenizer: Any, data: HeldOut, extractor: Extractor, seed: int, **more: Any) -> Report:
    """PSNR, codebook usage, edges, and distances of the chosen pictures' reconstructions to all held-out pictures."""
    report = Report(protocol("tokenizer", data, extractor, seed, **more))
    device = next(tokenizer.parameters()).device
    pixels, codes_NL = reconstruct(tokenizer, data.chosen, device, bar("reconstructions"))
    report.add("reconstructions", {
        "psnr": mean_figure(psnr(pixels, data.chosen), seed),
        "psnr_mask": mean_figure(masked_psnr(pixels, data.chosen), seed),
        "codes": float(tokenizer.vocab_size), "usage": usage(codes_NL, tokenizer.vocab_size),
        "perplexity": perplexity(codes_NL)})
    scores = edge_scores(canny_edges(pixels), canny_edges(data.chosen))
    report.add("reconstructions", {name: mean_figure(values, seed) for name, values in scores._asdict().items()})
    reference = features_of(data.pixels, extractor, "held-out originals", bar("features of originals"))
    features = features_of(pixels, extractor, "reconstructions", bar("features of reconstructions"))
    report.add("reconstructions", distances(features, reference, seed))
    return report
