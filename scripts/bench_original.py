"""LlamaGen's or MAR's own code beside arimg, same weights, same process: `python scripts/bench_original.py --llamagen
PATH`, or `--mar PATH`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from arimg.bench.exported import bench_painting, compiled_side, exported_sides, quantised_sides
from arimg.bench.original import ar_pair, load_llamagen, vq_pair
from arimg.bench.original_mar import bench_generation, load_mar, mar_pair
from arimg.bench.side_by_side import bench_decoding, bench_pixels, bench_training, to_markdown
from arimg.errors import InputError
from arimg.memory import keep_freed_memory
from arimg.presets import AR_PRESETS
from arimg.tokenizers.vq import VQConfig


def main() -> None:
    """Plain decoding (the default), training steps or pixels; of MAR steps of generation. Prints a page of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--llamagen", metavar="PATH", help="a checkout of FoundationVision/LlamaGen")
    whose.add_argument("--mar", metavar="PATH", help="a checkout of LTH14/mar: four of the --steps of MAR-B")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="training steps instead of decoding")
    what.add_argument("--paint", action="store_true", help="a whole picture, codes and pixels, instead of decoding")
    what.add_argument("--pixels", action="store_true", help="codes to pixels by VQ-16 instead of decoding")
    parser.add_argument("--preset", default="B", choices=sorted(AR_PRESETS))
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--bf16", action="store_true", help="bfloat16: autocast in training, weights in decoding")
    parser.add_argument("--our-bf16", action="store_true", help="of decoding, --pixels and --paint: arimg in bfloat16, "
                        "the original as it would be")
    parser.add_argument("--batch", type=int, default=4, help="of --train [default: 4]")
    parser.add_argument("--tokens", type=int, default=256, help="of decoding [default: 256]")
    parser.add_argument("--steps", type=int, default=64, help="of generation by MAR [default: 64]")
    parser.add_argument("--cfg", type=float, default=2.0, help="of decoding [default: 2]")
    parser.add_argument("--quantize", nargs="*", default=[], metavar="fp16|int8|int4",
                        help="of our weights, for decoding")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile as well")
    parser.add_argument("--export", nargs="*", default=[], metavar="onnx|openvino",
                        help="with --paint: our networks on these runtimes as well")
    parser.add_argument("--weights", nargs="*", default=["int8"], metavar="float32|int8|int4",
                        help="of the exported transformers [default: int8]")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, help="[default: torch's]")
    arguments = parser.parse_args()
    keep_freed_memory()                                 # for both sides
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")     # the profiler's own chatter
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.mar:
        report = bench_generation(mar_pair(load_mar(arguments.mar), arguments.layers), arguments.steps, arguments.cfg,
                                  arguments.turns)
        print(to_markdown(report))
        return
    original, preset = load_llamagen(arguments.llamagen), AR_PRESETS[arguments.preset]
    dtype = torch.bfloat16 if arguments.bf16 and not arguments.train else torch.float32
    our_dtype = torch.bfloat16 if arguments.our_bf16 and not arguments.train else dtype
    if arguments.pixels:
        report = bench_pixels(vq_pair(original, VQConfig(), our_dtype), 256, arguments.turns)
    else:
        pair = ar_pair(original, dtype, our_dtype, dim=preset.dim, n_layer=arguments.layers or preset.layers,
                       n_head=preset.heads)
        if arguments.paint:
            pixels = vq_pair(original, VQConfig(), our_dtype)
            with tempfile.TemporaryDirectory() as folder:
                others = compiled_side(pair, pixels) if arguments.compile else {}
                for name in arguments.quantize:
                    others |= quantised_sides(pair, pixels, name, arguments.compile)
                for name in arguments.export:
                    others |= exported_sides(pair, pixels, name, Path(folder) / name, arguments.weights)
                report = bench_painting(pair, pixels, arguments.tokens, arguments.cfg, arguments.turns, others)
        elif arguments.train:
            report = bench_training(pair, arguments.batch, arguments.turns, arguments.bf16, arguments.compile)
        else:
            report = bench_decoding(pair, arguments.tokens, arguments.cfg, arguments.turns, arguments.quantize,
                                    arguments.compile)
    print(to_markdown(report))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
