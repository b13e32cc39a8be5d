"""`arimg convert`: original checkpoint files into a pipeline folder."""

from __future__ import annotations

import click

from arimg.errors import InputError


@click.command("convert", epilog="\b\nExample: arimg convert --from llamagen vq_ds16_c2i.pt c2i_B_256.pt -o llamagen-b")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--from", "source", required=True, metavar="llamagen|controlar|var|mar|dd1", help="Whose files they are.")
@click.option("-o", "--output", required=True, metavar="DIR", help="The pipeline folder to write.")
@click.option("--preset", metavar="NAME", help="Size of the transformer, for example B or XL, where the file does not "
              "tell its number of heads.")
@click.option("--heads", type=int, help="Attention heads of the transformer, for sizes without a preset.")
@click.option("--encoder-heads", type=int, help="Attention heads of the control encoder [default: width / 64].")
@click.option("--image-size", type=int, metavar="PIXELS", help="Side of the model's images "
              "[default: as published, or 256].")
@click.option("--class-names", metavar="FILE", help="A text file with one class name per line, in the "
              "order of the ids.")
@click.option("--control-type", "control_types", multiple=True, default=("canny",), show_default=True, metavar="TYPE",
              help="What the control weights were trained on; may be repeated.")
@click.option("--text-encoder", metavar="DIR", help="Local folder of the T5 encoder that a text-conditional model "
              "reads prompts through.")
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True,
              help="Which weights of a training checkpoint.")
@click.option("--dtype", metavar="float32|bfloat16|...", help="Cast all weights [default: as in the files].")
def command(files: tuple[str, ...], source: str, output: str, class_names: str | None, dtype: str | None,
            preset: str | None, heads: int | None, encoder_heads: int | None, image_size: int | None,
            control_types: tuple[str, ...], text_encoder: str | None, weights: str) -> None:
    """Convert original checkpoint FILEs (tokenizer, transformer, control encoder; in any order) into a pipeline folder.

    Prints the folder. Pickles that would run code are refused.
    """
    import torch

    from arimg.devices import find_dtype
    from arimg.interop.convert import convert

    kind = None if dtype is None else find_dtype(dtype, torch.device("cpu"))
    folder = convert(source, files, output, preset=preset, heads=heads, encoder_heads=encoder_heads,
                     image_size=image_size, class_names=_lines(class_names), control_types=control_types,
                     text_encoder=text_encoder, weights="ema" if weights == "ema" else "model", dtype=kind,
                     notify=lambda line: click.echo(f"arimg: {line}", err=True))
    click.echo(folder)


def _lines(path: str | None) -> tuple[str, ...]:
    """Lines of a text file, stripped, without empty ones at the end. Raises InputError."""
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8") as stream:
            return tuple(line.strip() for line in stream.read().rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class-names {path}: cannot be read ({getattr(error, 'strerror', None) or error}); "
                         "give a text file with one name per line") from None
