"""`arimg export`: a pipeline folder whose networks run on ONNX Runtime or OpenVINO."""

from __future__ import annotations

import click


@click.command("export", epilog="\b\nExample: arimg export --runtime openvino --weights int8 -o emoji-int8\n"
                                "         arimg sample --model emoji-int8 --control examples/canny.png")
@click.option("--model", default="emoji", show_default=True, help="An embedded model, a pipeline folder or a hub id.")
@click.option("--runtime", required=True, metavar="onnx|openvino", help="What runs the networks; needs: pip install "
              "'arimg[export]'.")
@click.option("--weights", default="float32", show_default=True, metavar="float32|int8|int4", help="How the "
              "transformer's matrices are stored. openvino keeps activations in float32; onnx rounds those of int8 and "
              "int4 to 8 bits, which is faster.")
@click.option("--keep-tokenizer", is_flag=True, help="Leave the tokenizer to torch, which paints faster than both "
              "runtimes on a CPU without bfloat16 units.")
@click.option("-o", "--output", required=True, metavar="DIR", help="The pipeline folder to write.")
def command(model: str, runtime: str, weights: str, keep_tokenizer: bool, output: str) -> None:
    """Write a model for ONNX Runtime or OpenVINO, for faster pictures on a CPU.

    Prints the folder, which is a model like any other: give it to arimg sample --model, or to Pipeline.from_pretrained.
    The transformer (class or caption, control, any decoder of its kind) and the tokenizer's decoder are exported; the
    rest is copied.
    """
    from arimg.export import export_pipeline

    folder = export_pipeline(model, runtime, weights, output, keep_tokenizer,
                             notify=lambda line: click.echo(f"arimg: {line}", err=True))
    click.echo(folder)
