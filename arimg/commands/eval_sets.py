"""`arimg eval fid`, `reference`, `compare`: sets of pictures, and reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arimg.commands.eval_common import (check_file, data_option, extractor_options, load_data, load_extractor,
                                        report_options, show)

if TYPE_CHECKING:
    from arimg.evals.extractors import Extractor
    from arimg.evals.picture_sets import PictureSet

HELD_OUT = "held-out"
_MEASURED = "A"             # one name for all reports, so that two of them compare; the protocol says what A was


@click.command("fid", epilog="\b\nExample: arimg eval fid samples/ held-out --save samples.npz\n\n"
                             "Example: arimg eval fid samples.npz VIRTUAL_imagenet256_labeled.npz "
                             "--extractor inception")
@click.argument("pictures", metavar="A")
@click.argument("reference", metavar="B")
@click.option("--save", metavar="FILE", help="Write the statistics of A (.npz); later they stand in for its pictures.")
@extractor_options("effnet_lite0")
@report_options
@data_option
def fid(pictures: str, reference: str, save: str | None, extractor_name: str, inception: str | None, seed: int,
        data_folder: str | None, json_path: str | None) -> None:
    """Distances of the pictures A to the reference B.

    Each is a folder of pictures, an .npz of pictures (arr_0) or of their statistics (--save), or the word held-out: the
    held-out originals of the emoji data set. B may also be an .npz of moments (mu, sigma). Only with --extractor
    inception are the distances FID, KID, sFID; else they carry the name of the feature network.
    """
    check_file(json_path)
    check_file(save, ".npz")
    from arimg.evals.picture_sets import check_alike, check_enough, distances, figures
    from arimg.evals.report import Report, versions

    extractor = load_extractor(extractor_name, inception)
    first = _picture_set(pictures, extractor, data_folder)
    second, law, count = _reference(reference, extractor, data_folder)
    check_alike(first, law)
    check_enough(first, *([second] if second else []))
    report = Report({"evaluation": "fid", "versions": versions(), "extractor": extractor.describe(), "seed": seed,
                     "pictures": {"source": first.source, "fingerprint": _fingerprint(pictures, data_folder),
                                  "count": len(first), "size": list(first.size)},
                     "reference": {"source": law.source, "fingerprint": _fingerprint(reference, data_folder),
                                   "count": count}})
    report.add(_MEASURED, {"pictures": float(len(first)), **figures(first, law, seed)})
    if second is not None:
        report.add(_MEASURED, distances(first, second, seed))
    if save is not None:
        first.save(Path(save))
    show(report, json_path)


@click.command("reference", epilog="\b\nExample: arimg eval reference train/ -o reference.npz")
@click.argument("pictures", metavar="PICTURES")
@click.option("-o", "--output", required=True, metavar="FILE.npz")
@extractor_options("inception")
def reference(pictures: str, output: str, extractor_name: str, inception: str | None) -> None:
    """Write the statistics of a training set, against which generated samples are measured.

    The layout is that of ADM's VIRTUAL_imagenet256_labeled.npz: moments of all PICTURES (a folder or an .npz), and
    10,000 of them for precision and recall. Prints the file's name.
    """
    check_file(output, ".npz")
    from arimg.evals.held_out import bar
    from arimg.evals.picture_sets import load_pictures
    from arimg.evals.references import read_pixels, write_reference

    found = load_pictures(Path(pictures), load_extractor(extractor_name, inception), bar(pictures))
    write_reference(Path(output), found, read_pixels(Path(pictures), len(found)))
    click.echo(output)


@click.command("compare", epilog="\b\nExample: arimg eval compare a.json b.json")
@click.argument("first", metavar="A.json")
@click.argument("second", metavar="B.json")
def compare(first: str, second: str) -> None:
    """Two reports side by side, with differences; refused when they were not made by one protocol."""
    from arimg.evals.compare import compare as compared
    from arimg.evals.compare import read_report

    click.echo(compared(read_report(Path(first)), read_report(Path(second))))


def _picture_set(name: str, extractor: Extractor, data_folder: str | None) -> PictureSet:
    """Pictures, their features, or the held-out originals. Raises InputError."""
    from arimg.evals.held_out import bar, held_out
    from arimg.evals.picture_sets import features_of, load_pictures

    if name == HELD_OUT:
        return features_of(held_out(load_data(data_folder), None).pixels, extractor, name, bar(name))
    return load_pictures(Path(name), extractor, bar(name))


def _fingerprint(name: str, data_folder: str | None) -> str:
    from arimg.evals.picture_sets import fingerprint

    return load_data(data_folder).fingerprint if name == HELD_OUT else fingerprint(Path(name))


def _reference(name: str, extractor: Extractor, data_folder: str | None) -> Any:
    """(pictures or None, law, number of pictures or None). Raises InputError."""
    from arimg.evals.held_out import bar
    from arimg.evals.references import holds_moments, load_moments

    if name != HELD_OUT and holds_moments(Path(name)):
        return None, load_moments(Path(name), extractor, bar(name)), None
    found = _picture_set(name, extractor, data_folder)
    return found, found.law(), len(found)
