"""`arimg bench`: speed of training steps and of decoders, on this machine."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click


@click.group("bench", no_args_is_help=False, epilog="\b\nExample: arimg bench train configs/train/emoji/tokenizer.yaml")
def command() -> None:
    """Measure speed: what is compared runs side by side, in turns."""


def _write_json(path: str | None, report: Any) -> None:
    """A dataclass as JSON; numbers that do not exist become null."""
    import dataclasses
    import json

    from arimg import images

    if path is not None:
        with images.replacing(path) as stream:
            stream.write(json.dumps(_plain(dataclasses.asdict(report)), indent=1).encode() + b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_json(path: str | None) -> None:
    """Raises InputError before the long work when nothing can be written at `path`."""
    from arimg import images

    if path is not None:
        images.check_target(path)


@command.command("train", epilog="\b\nExample: arimg bench train configs/train/emoji/tokenizer.yaml data.batch_size=32 "
                                 "--compile")
@click.argument("config", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Measured steps per network.")
@click.option("--compile", "compare", is_flag=True, help="Measure the plain and the compiled network, in turns.")
@click.option("--precision", type=click.Choice(["no", "bf16"]), help="Instead of the config's train.precision.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures there.")
def train(config: str, overrides: tuple[str, ...], steps: int, compare: bool, precision: str | None,
          json_path: str | None) -> None:
    """Say where the time of a training step goes: batch, forward, backward, optimiser; images/s; FLOPs against the
    machine's matrix product; the largest operators. Prints a page of Markdown. Trains nothing that is kept."""
    from arimg.train.launch import load_run

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")     # the profiler's own chatter, which is no progress of ours
    _check_json(json_path)
    if precision is not None:
        overrides = (*overrides, f"train.precision={precision}")
    run = load_run(Path(config), overrides)
    from arimg.bench.train import bench_train, to_markdown

    report = bench_train(run, steps, compare)
    _write_json(json_path, report)
    click.echo(to_markdown(report))


@command.command("continuous", epilog="\b\nExample: arimg bench continuous --model mar-l --draft mar-b --steps 64 "
                                      "--cfg 3")
@click.option("--model", required=True, help="A pipeline folder or a hub id whose tokens are continuous.")
@click.option("--draft", metavar="DIR", help="A smaller pipeline of the same kind and tokenizer: adds the speculative "
              "decoders.")
@click.option("--window", "windows", multiple=True, type=click.IntRange(min=1), default=(4, 8), show_default=True,
              help="Drafted or iterated steps; repeat it.")
@click.option("--steps", type=click.IntRange(min=1), help="Of the plain decoder, for models that have a number of "
              "them [default: the decoder's].")
@click.option("--cfg", type=float, help="Guidance scale [default: the model's].")
@click.option("-n", "n", type=click.IntRange(min=1), default=2, show_default=True, help="Pictures, in one batch.")
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="Of everything, in turns.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|...")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures there.")
def continuous(model: str, draft: str | None, windows: tuple[int, ...], steps: int | None, cfg: float | None, n: int,
               repeats: int, device: str, dtype: str, json_path: str | None) -> None:
    """Compare decoders of continuous tokens: passes, head evaluations, acceptance, seconds, and the target alone at as
    many of its own passes as each speculative decoder makes. Prints a page of Markdown; docs/continuous.md explains
    it."""
    _check_json(json_path)
    from arimg.bench.continuous import bench_continuous, to_markdown
    from arimg.pipeline import Pipeline

    pipes = [None if name is None else Pipeline.from_pretrained(name, device, dtype) for name in (model, draft)]
    assert pipes[0] is not None
    report = bench_continuous(pipes[0], None if pipes[1] is None else pipes[1].transformer, windows, steps, cfg, n,
                              repeats)
    _write_json(json_path, report)
    click.echo(to_markdown(report))


@command.command("distilled", epilog="\b\nExample: arimg bench distilled --shape emoji --shape llamagen-B --batch 1 "
                                     "--batch 8")
@click.option("--shape", "shapes", multiple=True, default=("emoji", "llamagen-B"), show_default=True,
              metavar="emoji|llamagen-B|...", help="Sizes of teacher and student; repeat it.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), default=(1, 8), show_default=True,
              help="Pictures in a batch; repeat it.")
@click.option("--cfg", type=float, default=1.0, show_default=True, help="Guidance scale of the teacher; a student has "
              "it in its weights.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Of everything, in turns.")
@click.option("--compile", "compiled", is_flag=True, help="Put the student through torch.compile.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|...")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures there.")
def distilled(shapes: tuple[str, ...], batches: tuple[int, ...], cfg: float, repeats: int, compiled: bool, device: str,
              dtype: str, json_path: str | None) -> None:
    """Compare one pass of a one-step student with plain decoding by its teacher, on random weights, and with the
    machine's limit. Prints a page of Markdown; docs/distilled.md explains it."""
    _check_json(json_path)
    from arimg.bench.distilled import bench_distilled, to_markdown
    from arimg.devices import find_device, find_dtype

    place = find_device(device)
    report = bench_distilled(shapes, batches, cfg, repeats, place, find_dtype(dtype, place), compiled)
    _write_json(json_path, report)
    click.echo(to_markdown(report))


@command.command("decode", epilog="\b\nExample: arimg bench decode --decoder ar --decoder jacobi --window 8 "
                                  "--window 32 --cfg 1 --cfg 3")
@click.option("--model", default="emoji", show_default=True, help="An embedded model, a pipeline folder or a hub id.")
@click.option("--decoder", "names", multiple=True, metavar="NAME", help="Repeat it to compare some [default: all].")
@click.option("--window", "windows", multiple=True, metavar="W|auto", help="One row per window, for "
              "decoders that have one [default: the decoder's].")
@click.option("--cfg", "cfgs", multiple=True, type=float, metavar="X", help="Guidance scale; repeat it for several "
              "[default: the model's].")
@click.option("--control", multiple=True, metavar="FILE", help="Control images [default: held-out emoji, if "
              "the data set is there, else examples/*.png].")
@click.option("-n", "n", type=click.IntRange(min=1), default=4, show_default=True, help="Pictures, one at a time.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Of everything, in turns.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|...")
@click.option("--quantize", metavar="fp16|int8|int4", help="Of the transformer's blocks.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures there.")
def decode(model: str, names: tuple[str, ...], windows: tuple[str, ...], cfgs: tuple[float, ...],
           control: tuple[str, ...], n: int, repeats: int, device: str, dtype: str, quantize: str | None,
           json_path: str | None) -> None:
    """Compare decoders on the same pictures: passes, seconds, memory, and what a pass of W positions costs. Prints a
    table of Markdown; docs/bench.md explains its columns."""
    _check_json(json_path)
    from arimg.bench.decode import bench_decode, find_decoders, find_scenes, to_markdown
    from arimg.home import arimg_home
    from arimg.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, device, dtype, quantize=quantize)
    decoders = find_decoders(names, [int(window) if window.isdigit() else window for window in windows], pipe.decoders)
    scenes = find_scenes(pipe, control, arimg_home() / "data" / "emoji-128", n)
    model = model if quantize is None else f"{model} with {quantize} weights"
    report = bench_decode(pipe, model, scenes, decoders, cfgs or (pipe.settings.cfg,), repeats)
    _write_json(json_path, report)
    click.echo(to_markdown(report))


@command.command("startup", epilog="\b\nExample: arimg bench startup -- --control examples/canny.png --seed 7")
@click.argument("arguments", nargs=-1, metavar="[-- OPTIONS OF ARIMG SAMPLE]")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Fresh processes of each.")
@click.option("--json", "json_path", metavar="FILE", help="Write all figures there.")
def startup(arguments: tuple[str, ...], repeats: int, json_path: str | None) -> None:
    """Say where the time of one `arimg sample` goes: interpreter, imports, weights, control, tokens, pixels. Prints a
    table of Markdown."""
    _check_json(json_path)
    from arimg.bench.startup import bench_startup, to_markdown

    report = bench_startup(arguments, repeats)
    _write_json(json_path, report)
    click.echo(to_markdown(report))
