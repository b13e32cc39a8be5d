"""`arimg eval`: how good a tokenizer, a model's obedience to control images, or a set of pictures is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arimg.home import arimg_home

if TYPE_CHECKING:
    from arimg.data import EmojiSet
    from arimg.evals.picture_sets import Extractor, PictureSet
    from arimg.evals.report import Report

HELD_OUT = "held-out"


@click.group("eval", no_args_is_help=False,
             epilog="\b\nExample: arimg eval control --model emoji -n 200 --json control.json")
def command() -> None:
    """Measure tokenizers, obedience to controls, and sets of pictures.

    Prints a Markdown table; --json writes the figures with the whole protocol. What each metric means:
    docs/evaluation.md.
    """


def common(function: Callable) -> Callable:
    """The options that all measurements share."""
    for option in (
            click.option("--json", "json_path", metavar="FILE", help="Write figures and protocol there."),
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                         help="Chooses the pictures; sample k has seed + k."),
            click.option("--data", "data_folder", metavar="DIR",
                         help="The emoji data set [default: $ARIMG_HOME/data/emoji-128, or of the model's size].")):
        function = option(function)
    return function


@command.command("tokenizer", epilog="\b\nExample: arimg eval tokenizer --model runs/tokenizer/export/tokenizer")
@click.option("--model", default="emoji", show_default=True,
              help="An embedded model, a pipeline folder, a hub id, or the folder of one tokenizer.")
@click.option("-n", "count", type=int, help="Held-out pictures [default: all].")
@common
def tokenizer(model: str, count: int | None, seed: int, data_folder: str | None, json_path: str | None) -> None:
    """Reconstruct held-out pictures: PSNR, codebook usage, edges, distances."""
    _check_json(json_path)
    from arimg.evals.held_out import evaluate_tokenizer, held_out
    from arimg.evals.report import weight_hashes

    network, folder = _load_tokenizer(model)
    extractor = _extractor()
    report = evaluate_tokenizer(network, held_out(_data(data_folder), count, seed), extractor, seed,
                                model=model, weights_sha256=weight_hashes(folder))
    _show(report, json_path)


@command.command("control", epilog="\b\nExample: arimg eval control --type canny -n 200 --sweep --halves --styles "
                                   "--json control.json\n\nExample: arimg eval control --maps drawings/ --type canny")
@click.option("--model", default="emoji", show_default=True, help="An embedded model, a pipeline folder or a hub id.")
@click.option("--type", "kind", default="canny", show_default=True, metavar="TYPE", help="Type of the control images.")
@click.option("-n", "count", type=int, default=200, show_default=True, help="Samples.")
@click.option("--sweep", is_flag=True, help="Also strengths 0, 0.5, 1; control guidance 1, 2, 3; control end 0.5.")
@click.option("--halves", is_flag=True, help="Also pictures with canny on the left and lineart on the right.")
@click.option("--styles", is_flag=True, help="Also what a linear probe reads from the samples about their style.")
@click.option("--maps", metavar="DIR", help="Judge samples along the control images in this folder instead.")
@click.option("--class", "class_name", metavar="NAME|ID", help="With --maps: what to paint [default: no class].")
@click.option("--decoder", metavar="NAME", help="How tokens are decoded [default: the model's].")
@click.option("--cfg", type=float, metavar="X", help="Guidance scale [default: the model's].")
@click.option("--control-cfg", type=float, metavar="X", help="Guidance scale of the control [default: the model's].")
@click.option("--control-scale", type=float, metavar="X", help="Strength of the control [default: 1].")
@click.option("--temperature", type=float, help="[default: the model's].")
@click.option("--top-k", type=int, help="[default: the model's].")
@click.option("--top-p", type=float, help="[default: the model's].")
@click.option("--batch", type=click.IntRange(min=1), default=20, show_default=True,
              help="Pictures painted at once; does not change them.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|...")
@common
def control(model: str, kind: str, count: int, sweep: bool, halves: bool, styles: bool, maps: str | None,
            class_name: str | None, batch: int, device: str, dtype: str, seed: int, data_folder: str | None,
            json_path: str | None, **options: Any) -> None:
    """Paint along the maps of held-out pictures and compare edges and features with the originals."""
    _check_json(json_path)
    if maps is None and class_name is not None:
        raise click.UsageError("--class goes with --maps; held-out pictures have their own classes")
    if maps is not None and (sweep or halves or styles):
        raise click.UsageError("--sweep, --halves and --styles go with held-out pictures; leave them or --maps out")
    from arimg.checkpoints import find_model
    from arimg.evals.control import Painter, evaluate_control, evaluate_maps
    from arimg.evals.held_out import held_out
    from arimg.evals.report import weight_hashes
    from arimg.evals.styles import StyleJudge
    from arimg.pipeline import Pipeline

    folder = find_model(model)
    pipe = Pipeline.from_pretrained(folder, device, dtype)
    given = {name: value for name, value in options.items() if value is not None}
    painter = Painter(pipe, given, seed, batch)
    origin = {"model": model, "weights_sha256": weight_hashes(folder)}
    if maps is not None:
        _show(evaluate_maps(painter, Path(maps), kind, count, class_name, **origin), json_path)
        return
    emoji = _data(data_folder, pipe.settings.size[0])
    data, extractor = held_out(emoji, count, seed), _extractor()
    judge = StyleJudge(emoji, pipe.tokenizer, _style_extractor(), seed) if styles else None
    _show(evaluate_control(painter, data, kind, extractor, sweep, halves, judge, **origin), json_path)


@command.command("fid", epilog="\b\nExample: arimg eval fid samples/ held-out --save samples.npz")
@click.argument("pictures", metavar="A")
@click.argument("reference", metavar="B")
@click.option("--save", metavar="FILE", help="Write the statistics of A (.npz); later they stand in for its folder.")
@common
def fid(pictures: str, reference: str, save: str | None, seed: int, data_folder: str | None,
        json_path: str | None) -> None:
    """Distances of the pictures A to the reference B.

    Each is a folder of pictures, a statistics file (.npz), or the word held-out: the held-out originals of the emoji
    data set. The distances are not FID: they are taken in the features of EfficientNet-Lite0, and named after it.
    """
    _check_json(json_path)
    from arimg.errors import InputError
    from arimg.evals.picture_sets import distances
    from arimg.evals.report import Report, versions
    from arimg.images import check_target

    if save is not None:
        if not save.endswith(".npz"):
            raise InputError(f"--save {save}: statistics files end in .npz; name it {save}.npz")
        check_target(save)
    extractor = _extractor()
    first, second = (_picture_set(name, extractor, data_folder) for name in (pictures, reference))
    report = Report({"evaluation": "fid", "versions": versions(), "extractor": extractor.describe(), "seed": seed,
                     "pictures": {"source": first.source, "count": len(first), "size": list(first.size)},
                     "reference": {"source": second.source, "count": len(second)}})
    report.add(first.source, {"pictures": float(len(first)), **distances(first, second, seed)})
    if save is not None:
        first.save(Path(save))
    _show(report, json_path)


def _check_json(path: str | None) -> None:
    """Raises InputError when the report cannot be written, before the long work."""
    if path is not None:
        from arimg.images import check_target

        check_target(path)


def _data(folder: str | None, size: int = 128) -> EmojiSet:
    """The data set. Raises InputError."""
    from arimg.data import load_emoji

    return load_emoji(Path(folder) if folder else arimg_home() / "data" / f"emoji-{size}")


def _extractor() -> Extractor:
    """Raises MissingExtraError."""
    from arimg.evals.picture_sets import EffnetLite0Pooled

    return EffnetLite0Pooled()


def _style_extractor() -> Extractor:
    """Raises MissingExtraError."""
    from arimg.evals.picture_sets import EffnetLite0Stages

    return EffnetLite0Stages()


def _load_tokenizer(name: str) -> tuple[Any, Path]:
    """The tokenizer of a model, or of a component folder, in float32, and its folder. Raises CheckpointError."""
    import torch

    from arimg.checkpoints import CONFIG, INDEX, find_model, load_component
    from arimg.errors import CheckpointError

    own = Path(name).expanduser()
    alone = (own / CONFIG).is_file() and not (own / INDEX).is_file()
    folder = own if alone else find_model(name) / "tokenizer"
    network = load_component(folder, torch.float32)
    if not hasattr(network, "decode_codes"):
        raise CheckpointError(f"{folder}: holds a {type(network).__name__}, which is no tokenizer; give the folder of "
                              "one, or of a whole pipeline")
    return network, folder


def _picture_set(name: str, extractor: Extractor, data_folder: str | None) -> PictureSet:
    """A folder, a statistics file, or the held-out originals. Raises InputError."""
    from arimg.evals.held_out import bar, held_out
    from arimg.evals.picture_sets import features_of, load_folder, load_statistics

    if name == HELD_OUT:
        return features_of(held_out(_data(data_folder), None).pixels, extractor, name, bar(name))
    if name.endswith(".npz"):
        return load_statistics(Path(name))
    return load_folder(Path(name), extractor, bar(name))


def _show(report: Report, json_path: str | None) -> None:
    """The table on stdout, the whole in the file."""
    from arimg.commands.recipe import write_json

    if json_path is not None:
        write_json(json_path, report.as_json())
    click.echo(report.as_markdown())
