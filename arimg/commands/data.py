"""`arimg data`: data sets on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arimg.errors import InputError
from arimg.home import arimg_home

if TYPE_CHECKING:
    from arimg.train.codes import CodeCache
    from arimg.train.jobs import Job

_PICTURES_AT_ONCE = 32


@click.group("data", no_args_is_help=False, epilog="\b\nExample: arimg data emoji --size 128")
def command() -> None:
    """Build data sets."""


@command.command("emoji", epilog="\b\nExample: arimg data emoji --source npm-packages/ --size 128")
@click.option("--size", type=int, default=128, show_default=True, metavar="PIXELS")
@click.option("--source", metavar="DIR", help="The four npm packages, packed or unpacked [default: fetched with npm].")
@click.option("--out", metavar="DIR", help="[default: $ARIMG_HOME/data/emoji-SIZE].")
def emoji(size: int, source: str | None, out: str | None) -> None:
    """Render the emoji data set: about 14,400 pictures in 36 classes. Prints its folder."""
    from arimg.train.emoji import build_emoji

    folder = Path(out) if out else arimg_home() / "data" / f"emoji-{size}"
    if source is not None and not Path(source).is_dir():
        raise InputError(f"--source {source}: no such folder; give the one that holds the packages, or leave it out")
    click.echo(build_emoji(folder, Path(source) if source else None, size))


@command.command("index", epilog="\b\nExample: arimg data index /data/imagenet/train")
@click.argument("folder", metavar="DIR")
@click.option("--threads", type=click.IntRange(min=1), default=8, show_default=True, help="Shards read at once.")
def index(folder: str, threads: int) -> None:
    """Find the samples in the tar shards of DIR, once: image and .cls, .txt, .json of each key.

    Writes arimg-index.json and arimg-index.npy beside them and prints the former. Damaged shards are named and left
    out. Class names come from DIR/classes.txt, one a line.
    """
    from tqdm import tqdm

    from arimg.train.shards import INDEX_JSON, write_index

    with tqdm(desc="shards", unit="shard", file=sys.stderr) as bar:
        found = write_index(Path(folder), threads, bar.update)
    samples = sum(shard["samples"] for shard in found["shards"])
    click.echo(f"arimg: {samples} samples in {len(found['shards'])} shards, {len(found['skipped'])} left out", err=True)
    click.echo(Path(folder) / INDEX_JSON)


def job_options(function: Callable[..., None]) -> Callable[..., None]:
    """CONFIG.yaml [KEY=VALUE]... --shard K/N."""
    for option in (
            click.option("--shard", metavar="K/N", help="Make the K-th of N parts, K from 1 to N, one process for each "
                         "[default: all; under torchrun each process its part]."),
            click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")):
        function = option(function)
    return function


@command.command("codes", epilog="\b\nExample: arimg data codes --tokenizer "
                                 "~/.cache/arimg/runs/emoji-tokenizer/export/tokenizer\n\n"
                                 "Example: arimg data codes configs/train/llamagen/c2i-b-256.yaml --shard 3/64")
@click.argument("config", required=False, metavar="[CONFIG.yaml]")
@job_options
@click.option("--tokenizer", metavar="FOLDER", help="A tokenizer's component folder, for the emoji data.")
@click.option("--data", metavar="FOLDER", help="Made by arimg data emoji [default: $ARIMG_HOME/data/emoji-128].")
def codes(config: str | None, overrides: tuple[str, ...], shard: str | None, tokenizer: str | None,
          data: str | None) -> None:
    """Encode all crops of all pictures ahead of training. Prints where the codes are.

    With CONFIG.yaml: those of the run's data.folder, into its data.cache. Without: the emoji pictures and their mirror
    images. What has been encoded before is not encoded again: after any interruption the same line goes on.
    """
    if config is not None:
        from arimg.train.jobs import CodesJob

        _run(CodesJob(_load_run(config, overrides)), shard)
    elif tokenizer is None:
        raise click.UsageError("Missing option '--tokenizer', or the CONFIG.yaml of a run")
    else:
        _emoji_codes(tokenizer, Path(data) if data else arimg_home() / "data" / "emoji-128")


@command.command("maps", epilog="\b\nExample: arimg data maps configs/train/controlar/c2i-depth-b.yaml --type depth "
                                "--shard 3/64")
@click.argument("config", metavar="CONFIG.yaml")
@job_options
@click.option("--type", "kind", required=True, metavar="TYPE", help="Type of the control maps.")
def maps(config: str, overrides: tuple[str, ...], shard: str | None, kind: str) -> None:
    """Extract control maps of all crops ahead of training, for maps: cached. Prints where they are.

    What has been made before is not made again: after any interruption the same line goes on.
    """
    from arimg.train.jobs import MapsJob

    _run(MapsJob(_load_run(config, overrides), kind), shard)


@command.command("captions", epilog="\b\nExample: arimg data captions configs/train/llamagen/t2i-xl-256.yaml "
                                    "text_encoder=flan-t5-xl --shard 3/64")
@click.argument("config", metavar="CONFIG.yaml")
@job_options
def captions(config: str, overrides: tuple[str, ...], shard: str | None) -> None:
    """Compute the text features of all captions ahead of training. Prints where they are.

    Training reads them when data.cache is set and text_encoder is not.
    """
    from arimg.train.jobs import CaptionsJob

    _run(CaptionsJob(_load_run(config, overrides)), shard)


@command.command("throughput", epilog="\b\nExample: arimg data throughput configs/train/emoji/control.yaml "
                                      "tokenizer=FOLDER data.workers=4")
@click.argument("config", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--batches", type=click.IntRange(min=1), default=10, show_default=True, help="Micro-batches measured.")
def throughput(config: str, overrides: tuple[str, ...], batches: int) -> None:
    """Measure whether the loader of a run keeps up with its model, on one process. Prints both in samples/s."""
    from arimg.registry import OBJECTIVES
    from arimg.train.throughput import measure

    run = _load_run(config, overrides)
    click.echo(measure(run, OBJECTIVES.load(run.objective)(run), batches).line(run))


def _load_run(config: str, overrides: tuple[str, ...]) -> Any:
    from arimg.train.launch import load_run

    return load_run(Path(config), overrides)


def _run(job: Job, shard: str | None) -> None:
    """One part of a job; prints the folders."""
    from tqdm import tqdm

    from arimg.train.jobs import Part

    with tqdm(desc="samples", unit="sample", file=sys.stderr) as bar:
        caches = job.run(Part.parse(shard) if shard else Part.of_process(), bar.update)
    for cache in caches:
        click.echo(cache.folder)


def _emoji_codes(tokenizer: str, folder: Path) -> None:
    from arimg.data import load_emoji
    from arimg.devices import find_device
    from arimg.train.codes import CodeCache, load_coder

    emoji = load_emoji(folder)
    network = load_coder(tokenizer, find_device("auto"))
    cache = CodeCache(folder / "codes", emoji.images, network, emoji.fingerprint)
    _fill(cache)
    click.echo(cache.codes.filename)


def _fill(cache: CodeCache) -> None:
    """Ask for all codes once, a few at a time."""
    import numpy as np
    from tqdm import tqdm

    rows = np.arange(len(cache.codes))
    with tqdm(total=len(rows), desc="codes", unit="picture", file=sys.stderr) as bar:
        for start in range(0, len(rows), _PICTURES_AT_ONCE):
            chunk = rows[start:start + _PICTURES_AT_ONCE]
            cache.get(chunk)
            bar.update(len(chunk))


@command.command("pairs", epilog="\b\nExample: arimg data pairs --model emoji --data ~/.cache/arimg/data/emoji-128 "
                                 "--count 20000 -o pairs")
@click.option("--model", default="emoji", show_default=True, metavar="NAME|DIR", help="The teacher.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder of the pairs.")
@click.option("--count", type=int, default=100_000, show_default=True, metavar="N", help="How many pairs in all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Pair k has the noise of seed + k.")
@click.option("--data", metavar="DIR", help="Made by arimg data emoji; its classes and maps are the conditions "
              "[default: classes alone].")
@click.option("--captions", metavar="FILE", help="A caption a line: the conditions of a teacher that reads them.")
@click.option("--cfg", type=float, help="Guidance scale [default: the model's].")
@click.option("--control-cfg", type=float, help="Guidance scale of the control [default: the model's].")
@click.option("--temperature", type=float, help="[default: the model's].")
@click.option("--top-k", type=int, help="[default: the model's].")
@click.option("--top-p", type=float, help="[default: the model's].")
@click.option("--steps", type=int, default=50, show_default=True, help="Heun steps of the flow.")
@click.option("--batch", type=int, default=32, show_default=True, help="Pairs decoded at once.")
@click.option("--part", default="1/1", show_default=True, metavar="I/N", help="Make only this part of the files; start "
              "one process for each of the N parts.")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
def pairs(model: str, output: str, count: int, seed: int, data: str | None, captions: str | None, cfg: float | None,
          control_cfg: float | None, temperature: float | None, top_k: int | None, top_p: float | None, steps: int,
          batch: int, part: str, device: str, dtype: str) -> None:
    """Make the data of Distilled Decoding: what a teacher's flow makes of the noise of each seed. Prints the folder.

    After an interruption of any kind the same line goes on.
    """
    from tqdm import tqdm

    from arimg.accel.base import Guidance, Sampling
    from arimg.accel.flow import FlowSolver
    from arimg.pipeline import Pipeline
    from arimg.train.pairs import PairMaker, PairsConfig, make_pairs

    number, parts = _part(part)
    teacher = Pipeline.from_pretrained(model, device, dtype)
    own = teacher.settings
    guidance = Guidance(_or(cfg, own.cfg), _or(control_cfg, own.control_cfg), order=own.guidance_order,
                        plausibility=own.plausibility)
    sampling = Sampling(_or(temperature, own.temperature), _or(top_k, own.top_k), _or(top_p, own.top_p))
    config = PairsConfig(count, seed, data or "", captions or "", guidance, sampling, FlowSolver(steps), batch)
    with tqdm(total=count, desc="pairs", unit="pair", file=sys.stderr) as bar:
        speed = make_pairs(PairMaker(teacher, config), Path(output), number - 1, parts, bar.update)
    click.echo(f"arimg: {speed:.2f} pairs per second", err=True)
    click.echo(output)


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _part(text: str) -> tuple[int, int]:
    """(I, N) of "I/N". Raises InputError."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit()):
        raise InputError(f"--part {text}: give part and number of parts, for example 1/2 and 2/2")
    return int(first), int(second)
