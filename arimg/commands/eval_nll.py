"""`arimg eval nll`: what cheaper arithmetic costs."""

from __future__ import annotations

from pathlib import Path

import click

from arimg.commands.eval_common import check_file, data_option, load_data, report_options, show


@click.command("nll", epilog="\b\nExample: arimg eval nll --quantize int8 --quantize int4 --exported emoji-onnx")
@click.option("--model", default="emoji", show_default=True, help="An embedded model, a pipeline folder or a hub id.")
@click.option("--quantize", "formats", multiple=True, metavar="int8|int4", help="A form of the model, as in arimg "
              "sample; may be repeated.")
@click.option("--exported", "folders", multiple=True, metavar="DIR", help="A form of the model written by arimg "
              "export; may be repeated.")
@click.option("-n", "count", type=click.IntRange(min=2), default=32, show_default=True, help="Pictures.")
@click.option("--pictures", metavar="DIR", help="Take the pictures below this folder [default: the held-out pictures "
              "of --data].")
@click.option("--type", "kind", metavar="TYPE", help="Type of the control images [default: the first that the model "
              "was trained on, if any].")
@click.option("--dtype", default="float32", show_default=True, metavar="float32|bfloat16|...")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Pictures scored at once.")
@report_options
@data_option
def nll(model: str, formats: tuple[str, ...], folders: tuple[str, ...], count: int, pictures: str | None,
        kind: str | None, dtype: str, batch: int, seed: int, data_folder: str | None, json_path: str | None) -> None:
    """Score the tokens of held-out pictures with a model, its quantised forms and its exported ones.

    Prints nats per token, and by how many percent each form differs from the full model.
    """
    check_file(json_path)
    from arimg.checkpoints import find_model
    from arimg.evals.held_out import folder_pictures, held_out
    from arimg.evals.likelihood import evaluate_nll
    from arimg.evals.picture_sets import fingerprint_of
    from arimg.evals.report import weight_hashes
    from arimg.pipeline import Pipeline

    folder = find_model(model)
    full = Pipeline.from_pretrained(folder, "cpu", dtype)
    forms = {name: Pipeline.from_pretrained(folder, "cpu", dtype, quantize=name) for name in formats}
    forms |= {name: Pipeline.from_pretrained(name, "cpu", dtype) for name in folders}
    if pictures is not None:
        data = folder_pictures(Path(pictures), full.settings.size, count, seed)
    else:
        data = held_out(load_data(data_folder, full.settings.size[0]), count, seed)
    own = full.control_types[0] if full.control_types else None
    exported = {name: fingerprint_of(sorted(path for path in Path(name).rglob("*") if path.is_file()))
                for name in folders}
    show(evaluate_nll(full, forms, data, kind or own, batch, seed, model=model, weights_sha256=weight_hashes(folder),
                      exported=exported), json_path)
