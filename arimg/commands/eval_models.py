"""`arimg eval tokenizer`, `control`, `imagenet`, `all`: what a model does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from arimg.commands.eval_common import (check_file, config_option, data_option, extractor_options, given, load_data,
                                        load_extractor, place_options, report_options, sampling_options, show)
from arimg.commands.types import INTERVAL, WINDOW
from arimg.home import arimg_home

if TYPE_CHECKING:
    from arimg.evals.extractors import Extractor
    from arimg.evals.imagenet import Sampler
    from arimg.evals.tokenizer import Originals

model_option = click.option("--model", default="emoji", show_default=True,
                            help="An embedded model, a pipeline folder or a hub id.")
batch_option = click.option("--batch", type=click.IntRange(min=1), default=20, show_default=True,
                            help="Pictures painted at once; does not change them.")


@click.command("tokenizer", epilog="\b\nExample: arimg eval tokenizer --model runs/tokenizer/export/tokenizer\n\n"
                                   "Example: arimg eval tokenizer --model c2i --pictures imagenet/val --size 256 "
                                   "--extractor inception")
@click.option("--model", default="emoji", show_default=True,
              help="An embedded model, a pipeline folder, a hub id, or the folder of one tokenizer.")
@click.option("-n", "count", type=int, help="Pictures [default: all].")
@click.option("--pictures", metavar="DIR", help="Reconstruct the pictures below this folder, for example ImageNet's "
              "validation set [default: the held-out pictures of --data].")
@click.option("--size", type=click.IntRange(min=8), default=256, show_default=True, metavar="PIXELS",
              help="With --pictures: the square that is cropped for the tokenizer.")
@click.option("--measured-size", type=click.IntRange(min=8), metavar="PIXELS",
              help="With --pictures: the square that is compared [default: --size, at most 256].")
@click.option("--reference", metavar="FILE", help="Features of the validation pictures (--save of arimg eval fid), or "
              "the pictures as .npz [default: the originals themselves].")
@click.option("--lpips", nargs=2, metavar="VGG HEADS", help="Weight files of LPIPS: vgg16-397923af.pth and vgg.pth.")
@extractor_options("effnet_lite0")
@config_option
@report_options
@data_option
def tokenizer(model: str, count: int | None, pictures: str | None, size: int, measured_size: int | None,
              reference: str | None, lpips: tuple[str, str] | None, extractor_name: str, inception: str | None,
              seed: int, data_folder: str | None, json_path: str | None) -> None:
    """Reconstruct pictures: PSNR, SSIM, LPIPS if its weights are given, codebook usage, edges, distances (rFID)."""
    check_file(json_path)
    from arimg.evals.extractors import sha256_of
    from arimg.evals.held_out import bar
    from arimg.evals.picture_sets import fingerprint
    from arimg.evals.report import weight_hashes
    from arimg.evals.tokenizer import Judges, evaluate_tokenizer
    from arimg.tokenizers.losses import lpips_vgg16

    network, folder = _load_tokenizer(model)
    extractor = load_extractor(extractor_name, inception)
    originals, law = _originals(pictures, size, measured_size, data_folder, count, seed, extractor, reference)
    network_of_lpips = lpips_vgg16(Path(lpips[0]), Path(lpips[1])) if lpips else None
    origin_of_law = reference and {"source": reference, "fingerprint": fingerprint(Path(reference))}
    report = evaluate_tokenizer(network, originals, Judges(extractor, network_of_lpips, law), seed,
                                bar("reconstructions"), model=model, weights_sha256=weight_hashes(folder),
                                reference=origin_of_law,
                                lpips_sha256=[sha256_of(Path(one)) for one in lpips or ()])
    show(report, json_path)


def _originals(pictures: str | None, size: int, measured_size: int | None, data_folder: str | None, count: int | None,
               seed: int, extractor: Extractor, reference: str | None) -> tuple[Originals, Any]:
    """What is reconstructed, and the features it is compared with (None = its own). Raises InputError."""
    from arimg.evals.held_out import bar, held_out
    from arimg.evals.picture_sets import features_of
    from arimg.evals.references import reconstruction_reference
    from arimg.evals.tokenizer import FolderPictures, HeldOutPictures

    given_law = reconstruction_reference(Path(reference), extractor, bar(reference)) if reference else None
    if pictures is not None:
        measured = measured_size or min(size, 256)
        return FolderPictures.below(Path(pictures), count, size, measured, seed), given_law
    data = held_out(load_data(data_folder), count, seed)
    law = given_law or features_of(data.pixels, extractor, "held-out originals", bar("features of originals"))
    return HeldOutPictures(data, seed), law


@click.command("control", epilog="\b\nExample: arimg eval control --type canny -n 200 --sweep --halves --styles "
                                 "--json control.json\n\nExample: arimg eval control --maps drawings/ --type canny")
@model_option
@click.option("--type", "kind", default="canny", show_default=True, metavar="TYPE", help="Type of the control images.")
@click.option("-O", "--option", "assignments", multiple=True, metavar="KEY=VALUE",
              help="An option of the extractor of control images, for example model=FOLDER; may be repeated.")
@click.option("-n", "count", type=click.IntRange(min=1), default=200, show_default=True, help="Samples.")
@click.option("--sweep", is_flag=True, help="Also strengths 0, 0.5, 1; control guidance 1, 2, 3; control end 0.5.")
@click.option("--halves", is_flag=True, help="Also pictures with canny on the left and lineart on the right.")
@click.option("--styles", is_flag=True, help="Also what a linear probe reads from the samples about their style.")
@click.option("--pictures", metavar="DIR", help="Take maps and classes from the pictures below this folder, such as "
              "ImageNet's validation set [default: the held-out pictures of --data].")
@click.option("--maps", metavar="DIR", help="Judge samples along the control images in this folder instead.")
@click.option("--class", "class_name", metavar="NAME|ID", help="With --maps: what to paint [default: no class].")
@sampling_options
@click.option("--control-cfg", type=float, metavar="X", help="Guidance scale of the control [default: the model's].")
@click.option("--guidance-order", metavar="class-first|control-first", help="[default: the model's].")
@click.option("--plausibility", type=float, metavar="A", help="As in arimg sample [default: the model's].")
@click.option("--control-scale", type=float, metavar="X", help="Strength of the control [default: 1].")
@batch_option
@place_options
@extractor_options("effnet_lite0")
@config_option
@report_options
@data_option
def control(model: str, kind: str, assignments: tuple[str, ...], count: int, sweep: bool, halves: bool, styles: bool,
            pictures: str | None, maps: str | None, class_name: str | None, batch: int, device: str, dtype: str,
            extractor_name: str, inception: str | None, seed: int, data_folder: str | None, json_path: str | None,
            **options: Any) -> None:
    """Paint along the maps of held-out pictures and compare edges, maps and features with the originals."""
    check_file(json_path)
    if maps is None and class_name is not None:
        raise click.UsageError("--class goes with --maps; held-out pictures have their own classes")
    if maps is not None and (sweep or halves or styles or pictures or assignments):
        raise click.UsageError("--sweep, --halves, --styles, --pictures and -O go with pictures; leave them or --maps "
                               "out")
    typed = click.get_current_context().get_parameter_source
    if maps is not None and {typed("extractor_name"), typed("inception")} != {ParameterSource.DEFAULT}:
        raise click.UsageError("--extractor and --inception go with pictures: along --maps only edges are compared; "
                               "leave them or --maps out")
    if pictures is not None and styles:
        raise click.UsageError("--styles goes with the emoji data set; leave it or --pictures out")
    from arimg.checkpoints import find_model
    from arimg.commands.control import extractor_options as map_options_of
    from arimg.evals.control import evaluate_control, evaluate_maps
    from arimg.evals.held_out import folder_pictures, held_out
    from arimg.evals.painter import Painter
    from arimg.evals.report import weight_hashes
    from arimg.evals.styles import StyleJudge
    from arimg.pipeline import Pipeline

    map_options = map_options_of(assignments)
    folder = find_model(model)
    pipe = Pipeline.from_pretrained(folder, device, dtype)
    painter = Painter(pipe, given(options), seed, batch)
    origin = {"model": model, "weights_sha256": weight_hashes(folder)}
    if maps is not None:
        show(evaluate_maps(painter, Path(maps), kind, count, class_name, **origin), json_path)
        return
    extractor, judge = load_extractor(extractor_name, inception, pipe.device), None
    if pictures is not None:
        data = folder_pictures(Path(pictures), pipe.settings.size, count, seed)
    else:
        emoji = load_data(data_folder, pipe.settings.size[0])
        data = held_out(emoji, count, seed)
        judge = StyleJudge(emoji, pipe.tokenizer, _style_extractor(), seed) if styles else None
    show(evaluate_control(painter, data, kind, extractor, sweep, halves, judge, map_options, **origin), json_path)


@click.command("imagenet", epilog="\b\nExample: torchrun --nproc_per_node 8 -m arimg eval imagenet --model c2i-b "
                                  "--cfg 2 --reference VIRTUAL_imagenet256_labeled.npz --json c2i-b.json\n\n"
                                  "Example: arimg eval imagenet --config configs/eval/imagenet-llamagen-b.yaml")
@model_option
@click.option("-n", "--num", "number", type=click.IntRange(min=2), default=50_000, show_default=True,
              help="Samples. After torchrun write -n: it takes --num for its own.")
@click.option("--classes", type=click.Choice(["uniform", "balanced"]), default="uniform", show_default=True,
              help="Each class at random (LlamaGen), or all equally often.")
@click.option("--reference", metavar="FILE.npz", help="Statistics of the training set: VIRTUAL_imagenet256_labeled.npz "
              "[default: none, so no FID, sFID, precision and recall].")
@sampling_options
@click.option("--cfg-interval", type=INTERVAL, metavar="A:B", help="Token positions A to B-1 are guided.")
@click.option("--window", type=WINDOW, metavar="W|auto", help="Positions that a pass of the decoder judges.")
@click.option("--steps", type=int, help="For decoders with a number of steps.")
@click.option("--lossy", is_flag=True, default=None, help="Allow decoders that do not keep the model's law.")
@click.option("--size", type=click.IntRange(min=8), metavar="PIXELS", help="Samples are brought to this size before "
              "they are measured [default: 256 if the model paints more, else the model's].")
@click.option("--rounds", type=click.IntRange(min=0), default=20, show_default=True,
              help="Of the bootstrap for each Frechet distance; every one reads all features once.")
@click.option("--batch", type=click.IntRange(min=1), default=50, show_default=True, help="Samples painted at once.")
@click.option("--shard", type=click.IntRange(min=1), default=500, show_default=True,
              help="Samples written at once; a kill loses those in the making.")
@click.option("--work", metavar="DIR", help="Where shards lie, for this run and for going on after a kill [default: a "
              "folder in $ARIMG_HOME/evals that belongs to these samples].")
@click.option("--save-npz", metavar="FILE.npz", help="Also write all samples (arr_0), for other evaluators.")
@place_options
@extractor_options("inception")
@config_option
@report_options
def imagenet(model: str, number: int, classes: str, reference: str | None, size: int | None, rounds: int, batch: int,
             shard: int, work: str | None, save_npz: str | None, device: str, dtype: str, extractor_name: str,
             inception: str | None, seed: int, json_path: str | None, **options: Any) -> None:
    """Sample classes and measure FID, sFID, IS, precision and recall by the protocol of ADM's evaluator.

    Runs on one process or on several (torchrun), and goes on where it was interrupted; neither changes a sample.
    """
    check_file(json_path)
    check_file(save_npz, ".npz")
    from arimg.checkpoints import find_model
    from arimg.evals.imagenet import Plan, Sampler, measured_size
    from arimg.evals.processes import all_processes
    from arimg.evals.references import check_fits, check_generation_reference
    from arimg.evals.report import weight_hashes
    from arimg.pipeline import Pipeline

    if reference is not None:
        check_generation_reference(Path(reference))
    folder = find_model(model)
    with all_processes() as processes:
        pipe = Pipeline.from_pretrained(folder, processes.device(device), dtype)
        measured = (size, size) if size else measured_size(pipe.settings.size)
        sampler = Sampler(pipe, given(options), Plan(number, seed, classes, measured, shard, batch))
        extractor = load_extractor(extractor_name, inception, pipe.device)
        if reference is not None:
            check_fits(Path(reference), extractor, measured)
        origin = {"model": model, "weights_sha256": weight_hashes(folder)}
        _sample_and_measure(sampler, extractor, processes, origin, reference, rounds, work, save_npz, json_path)


def _sample_and_measure(sampler: Sampler, extractor: Extractor, processes: Any, origin: dict[str, Any],
                        reference: str | None, rounds: int, work: str | None, save_npz: str | None,
                        json_path: str | None) -> None:
    from arimg.evals.held_out import bar
    from arimg.evals.imagenet import evaluate_samples, sample_shards, save_pictures, work_folder
    from arimg.evals.references import generation_reference
    from arimg.evals.shards import Shards

    identity = {**sampler.identity(), "weights_sha256": origin["weights_sha256"], "extractor": extractor.describe()}
    folder = Path(work) if work else work_folder(arimg_home(), identity)
    shards = Shards(folder, identity, sampler.plan.number, sampler.plan.shard)
    sample_shards(sampler, extractor, shards, processes, save_npz is not None,
                  bar("shards") if processes.rank == 0 else iter)
    processes.wait()
    if processes.rank:
        return
    shards.drop(".arimg-*.tmp")
    if save_npz is not None:
        save_pictures(Path(save_npz), shards, sampler.plan)
    law = generation_reference(Path(reference), extractor, bar("reference")) if reference else None
    report = evaluate_samples(sampler, extractor, shards, law, rounds, processes, reference=_described(reference),
                              **origin)
    show(report, json_path)


def _described(reference: str | None) -> dict[str, str] | None:
    from arimg.evals.extractors import sha256_of

    if reference is None:
        return None
    return {"kind": "training statistics", "sha256": sha256_of(Path(reference))}


@click.command("all", epilog="\b\nExample: arimg eval all --model emoji -n 200 --json emoji.json "
                             "--markdown docs/evaluation.md")
@model_option
@click.option("-n", "count", type=int, default=200, show_default=True, help="Pictures per row.")
@click.option("--markdown", metavar="FILE", help="Write the table there: a new file, or between the marked lines of an "
              "existing one.")
@click.option("--work", metavar="DIR", help="Where finished rows lie, for going on after a kill [default: a folder in "
              "$ARIMG_HOME/evals that belongs to this measurement].")
@batch_option
@place_options
@extractor_options("effnet_lite0")
@report_options
@data_option
def all_rows(model: str, count: int, markdown: str | None, work: str | None, batch: int, device: str, dtype: str,
             extractor_name: str, inception: str | None, seed: int, data_folder: str | None,
             json_path: str | None) -> None:
    """One table of the whole model: tokenizer, classes alone, every control type, every decoder.

    Goes on row by row where it was interrupted.
    """
    check_file(json_path)
    from arimg.checkpoints import find_model
    from arimg.evals import table
    from arimg.evals.held_out import held_out
    from arimg.evals.painter import Painter
    from arimg.evals.report import weight_hashes
    from arimg.pipeline import Pipeline

    if markdown is not None:
        check_file(markdown)
        table.check_markdown(Path(markdown))
    folder = find_model(model)
    pipe = Pipeline.from_pretrained(folder, device, dtype)
    data = held_out(load_data(data_folder, pipe.settings.size[0]), count, seed)
    rows = table.Table(Painter(pipe, {}, seed, batch), data, load_extractor(extractor_name, inception, pipe.device))
    weights = weight_hashes(folder)
    place = Path(work) if work else table.work_folder(arimg_home(), rows, weights)
    report = table.evaluate_all(rows, place, model=model, weights_sha256=weights)
    show(report, json_path)
    if markdown is not None:
        line = (f"arimg eval all --model {model} -n {count} --batch {batch} --seed {seed} "
                f"--extractor {extractor_name}")
        table.write_markdown(Path(markdown), table.as_page(report, line))


def _style_extractor() -> Extractor:
    """Raises MissingExtraError."""
    from arimg.evals.extractors import EffnetLite0Stages

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
    if not hasattr(network, "space"):
        raise CheckpointError(f"{folder}: holds a {type(network).__name__}, which is no tokenizer; give the folder of "
                              "one, or of a whole pipeline")
    return network, folder
