"""`arimg control`: a control image from a photo."""

from __future__ import annotations

import click

from arimg.errors import InputError


@click.command("control", epilog="\b\nExample: arimg control canny photo.jpg -o map.png -O low=50 -O high=150")
@click.argument("kind", metavar="[TYPE", required=False)
@click.argument("photo", metavar="PHOTO]", required=False)
@click.option("-o", "--output", default="map.png", show_default=True, metavar="FILE")
@click.option("-O", "--option", "assignments", multiple=True, metavar="KEY=VALUE",
              help="An option of the extractor, for example low=50; may be repeated.")
@click.option("--list", "listed", is_flag=True, help="List the types: ready, or what is missing and how to get it.")
def command(kind: str | None, photo: str | None, output: str, assignments: tuple[str, ...], listed: bool) -> None:
    """Make a control image of a TYPE from a PHOTO, and print its file name."""
    if listed:
        _list()
        return
    if kind is None or photo is None:
        raise click.UsageError("give a TYPE and a PHOTO, or --list")
    from arimg import images
    from arimg.control.base import build

    images.check_output(output)
    extractor = build(kind, **extractor_options(assignments))
    images.save_image(extractor(images.load_image(photo, "photo")), output)
    click.echo(output)


def extractor_options(assignments: tuple[str, ...]) -> dict[str, str]:
    """Keyword arguments from KEY=VALUE texts. Raises InputError."""
    for assignment in assignments:
        if not assignment.partition("=")[0] or "=" not in assignment:
            raise InputError(f"-O {assignment}: write it as key=value, for example -O low=50")
    return {key: value for key, _, value in (assignment.partition("=") for assignment in assignments)}


def _list() -> None:
    from arimg.control.base import statuses

    for name, kind, status in statuses():
        ready = "ready" if status.ready else "missing"
        click.echo(f"{name:10} {ready:8} {kind.summary}; {kind.polarity}. {status.detail}")
