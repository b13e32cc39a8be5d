"""Class-conditional samples by the protocol of ADM's evaluator (Dhariwal and Nichol 2021), as LlamaGen uses it.

Sample k has seed S + k and a class that follows from k alone, whatever process paints it and however often the run was
interrupted. Samples are made shard by shard; of each stay the features and a hash, unless its pictures are to be saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arimg.data import to_pixels
from arimg.errors import InputError
from arimg.evals.adm_npz import write_npz
from arimg.evals.extractors import AdmInception, Extractor, extract, metric_name
from arimg.evals.picture_sets import Bar, Law, PictureSet, figures
from arimg.evals.processes import Processes
from arimg.evals.report import Report, settled_options, versions
from arimg.evals.scores import inception_score
from arimg.evals.shards import Shards
from arimg.evals.tokenizer import resized
from arimg.pipeline import Pipeline

CLASSES = ("uniform", "balanced")
PUBLISHED_NUMBER = 50_000
PUBLISHED_SIZE = (256, 256)


@dataclass(frozen=True)
class Plan:
    """Which samples are made. classes: "uniform" draws each at random, as LlamaGen; "balanced" takes all equally often,
    in a shuffled order. size: (height, width) of the pictures that are measured."""

    number: int
    seed: int
    classes: str
    size: tuple[int, int]
    shard: int = 500
    batch: int = 50

    def class_ids(self, count: int) -> np.ndarray:
        """ids_N of `count` classes."""
        generator = np.random.default_rng([self.seed, count])
        if self.classes == "uniform":
            return generator.integers(count, size=self.number)
        return generator.permutation(np.arange(self.number) % count)


@dataclass(frozen=True)
class Sampler:
    """A pipeline, the options of all its calls, and the plan."""

    pipe: Pipeline
    options: Mapping[str, Any]
    plan: Plan

    def __post_init__(self) -> None:
        """Raises InputError on a model without classes."""
        if self.pipe.transformer.config.conditioning != "class":
            raise InputError("this model reads captions, and the ImageNet protocol samples classes; give a model with "
                             "classes, or measure folders of pictures with: arimg eval fid")

    def identity(self) -> dict[str, Any]:
        """All that decides the pictures, JSON-able; weights and extractor come on top."""
        ids_N = self.plan.class_ids(self.pipe.transformer.config.num_classes)
        plan = self.plan
        return {"number": plan.number, "seed": plan.seed, "classes": plan.classes, "size": list(plan.size),
                "num_classes": self.pipe.transformer.config.num_classes,
                "class_ids_sha256": hashlib.sha256(ids_N.astype("<i8").tobytes()).hexdigest(),
                "options": settled_options(self.pipe, self.options), "versions": versions(),
                "work": {"shard": plan.shard, "batch": plan.batch}}

    def paint(self, rows: range) -> tuple[np.ndarray, int]:
        """(pixels_BHW3, forward passes) of some samples."""
        ids_N = self.plan.class_ids(self.pipe.transformer.config.num_classes)
        out = self.pipe(class_id=ids_N[rows.start:rows.stop].tolist(), seeds=[self.plan.seed + k for k in rows],
                        output_type="latent", **self.options)
        images_B3HW = self.pipe.tokenizer.decode(out.latents)
        return to_pixels(resized(images_B3HW, self.plan.size)), out.stats.forward_passes


def sample_shards(sampler: Sampler, extractor: Extractor, shards: Shards, processes: Processes,
                  pictures: bool = False, bar: Bar = iter) -> None:
    """Make the shards of this process that are not on disk yet: every `processes.count`-th is its own."""
    own = range(processes.rank, len(shards), processes.count)
    for index in bar([index for index in own if not shards.complete(index, pictures)]):
        rows, pixels, passes = shards.rows(index), [], 0
        for start in range(rows.start, rows.stop, sampler.plan.batch):
            pixels_BHW3, more = sampler.paint(range(start, min(start + sampler.plan.batch, rows.stop)))
            pixels.append(pixels_BHW3)
            passes += more
        digests = [hashlib.sha256(one_HW3.tobytes()).digest() for batch in pixels for one_HW3 in batch]
        shards.write(index, extract(pixels, extractor), np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
                     passes, np.concatenate(pixels) if pictures else None)


def evaluate_samples(sampler: Sampler, extractor: Extractor, shards: Shards, law: Law | None, rounds: int,
                     processes: Processes = Processes(), **more: Any) -> Report:
    """The figures of complete shards. Raises InputError on a reference that was not made alike."""
    plan = sampler.plan
    protocol = {"evaluation": "imagenet", **sampler.identity(), "extractor": extractor.describe(),
                "bootstrap_rounds": rounds, "pictures_sha256": shards.digest(), **more}
    protocol["work"]["processes"] = processes.count
    protocol["not_comparable_with_published"] = departures(plan, extractor, law)
    report = Report(protocol)
    with shards.features() as features:
        samples = PictureSet(features, extractor.name, plan.size, "samples")
        if law is not None:
            report.add("samples", figures(samples, law, plan.seed, rounds))
        elif features.logits_NK is not None:
            report.add("samples", {metric_name("inception_score", extractor.name):
                                   inception_score(features.logits_NK, plan.seed)})
    batches = sum(-(-len(shards.rows(index)) // plan.batch) for index in range(len(shards)))
    report.add("samples", {"pictures": float(plan.number), "forward_passes": shards.forward_passes() / batches})
    return report


def departures(plan: Plan, extractor: Extractor, law: Law | None) -> list[str]:
    """Why the figures do not compare with published FID; empty if nothing is known against it."""
    reasons = {
        f"{plan.number} samples, not {PUBLISHED_NUMBER}": plan.number != PUBLISHED_NUMBER,
        f"pictures of {plan.size[0]}x{plan.size[1]}, not 256x256": plan.size != PUBLISHED_SIZE,
        f"extractor {extractor.name}, or weights that are not the published ones":
            not (isinstance(extractor, AdmInception) and extractor.published),
        "no reference with spatial moments and pictures":
            law is None or law.spatial is None or law.pool_MC is None,
    }
    return [reason for reason, holds in reasons.items() if holds]


def work_folder(home: Path, identity: Mapping[str, Any]) -> Path:
    """The default place of the shards: the same for the same samples."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return home / "evals" / f"imagenet-{digest}"


def save_pictures(path: Path, shards: Shards, plan: Plan) -> None:
    """Stream the pictures into an .npz in ADM's layout, then drop them from the work folder. Raises InputError."""
    write_npz(path, (plan.number, *plan.size, 3), shards.pictures())
    shards.drop("pictures-*.npy")


def measured_size(size: tuple[int, int]) -> tuple[int, int]:
    """What pictures of a model are measured at: 256 pixels a side if the model paints more."""
    return PUBLISHED_SIZE if min(size) > min(PUBLISHED_SIZE) else size
