"""`arimg models`: the models inside the package."""

from __future__ import annotations

import click


@click.command("models", epilog="\b\nExample: arimg models")
def command() -> None:
    """List the installed models: size, what they were trained on, source, licence."""
    from arimg.checkpoints import list_models

    found = list_models()
    if not found:
        click.echo("no model is installed; a pipeline folder or a hub id also serves as --model", err=True)
    for model in found:
        settings = model.settings
        height, width = settings.size
        click.echo(f"{model.name}: {settings.title} ({height}x{width} pixels, {model.bytes / 1e6:.1f} MB)")
        details = {"controls": ", ".join(settings.control_types), "classes": ", ".join(settings.class_names),
                   "decoders": ", ".join((settings.decoder, *model.decoders)), "source": settings.source,
                   "licence": settings.licence, "folder": model.folder}
        for label, text in details.items():
            if text:
                click.echo(f"  {label:9} {text}")
