"""`arimg sample`: pictures along control images, written with all that is needed to repeat them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arimg.commands import recipe
from arimg.commands.types import INTERVAL, SIZE, WINDOW

if TYPE_CHECKING:
    from arimg.accel.base import StepInfo
    from arimg.pipeline import Pipeline, PipelineOutput

_MODEL_DEFAULTS = ("decoder", "cfg", "control_cfg", "guidance_order", "plausibility", "temperature",
                   "top_k", "top_p", "size")


@click.command("sample", epilog="\b\nExample: arimg sample --control examples/canny.png --class fluent/animals "
                                "--seed 7 -n 4 -o cat.png")
@click.option("--control", multiple=True, metavar="FILE", help="A control image. Repeat this, --control-type, "
              "--control-scale, --control-start and --control-end for several; they pair up in order.")
@click.option("--control-from", multiple=True, metavar="PHOTO", help="A photo whose control image is extracted first; "
              "pairs up after all --control.")
@click.option("--control-type", multiple=True, metavar="TYPE", help="What the control image shows, for example canny "
              "[default: the first that the model was trained on].")
@click.option("--control-scale", multiple=True, type=float, help="Strength of the control; 0 is none [default: 1].")
@click.option("--control-start", multiple=True, type=float, help="Part of the picture (raster order) where the control "
              "begins [default: 0].")
@click.option("--control-end", multiple=True, type=float, help="Where it ends [default: 1].")
@click.option("--control-cfg", type=float, metavar="X", help="Guidance scale of the control alone [default: --cfg].")
@click.option("--guidance-order", metavar="class-first|control-first", help="Whether --cfg compares the class with "
              "any, or the class along the control with any along it [default: the model's].")
@click.option("--resize", default="pad", show_default=True, metavar="pad|crop|stretch",
              help="How a control image of another shape is fitted.")
@click.option("--model", default="emoji", show_default=True, help="An embedded model, a pipeline folder or a hub id.")
@click.option("--class", "class_name", metavar="NAME|ID", help="What to paint; none = whatever fits the control.")
@click.option("--prompt", metavar="TEXT", help="What to paint, for models that read captions.")
@click.option("--decoder", metavar="NAME", help="How tokens are decoded [default: the model's].")
@click.option("--window", type=WINDOW, metavar="W|auto", help="Positions that a pass of the decoder judges [default: "
              "the decoder's].")
@click.option("--steps", type=int, metavar="N", help="Steps of decoders that have a number of them "
              "(masked: 64; dd1, dd2: 1).")
@click.option("--verify", is_flag=True, help="Let the model correct the tokens of a one-step decoder (dd1, dd2) to its "
              "own.")
@click.option("--lossy", is_flag=True, help="Allow decoders that do not keep the model's law (gsd, zipar; dd1, dd2 "
              "without --verify).")
@click.option("--cfg", type=float, metavar="X", help="Guidance scale; 1 is none [default: the model's].")
@click.option("--cfg-interval", type=INTERVAL, default="0:", metavar="A:B", help="Token positions A to B-1 are guided; "
              "no B = to the end [default: all].")
@click.option("--plausibility", type=float, metavar="A", help="Bar codes that the model, unguided, finds less likely "
              "than A times the best one; 0 bars none [default: the model's].")
@click.option("--temperature", type=float, help="0 = always the most likely token [default: the model's].")
@click.option("--top-k", type=int, help="Only the k most likely tokens; 0 = all [default: the model's].")
@click.option("--top-p", type=float, help="Only the most likely tokens that hold p; 1 = all [default: the model's].")
@click.option("--seed", type=int, default=0, show_default=True, help="Picture k has seed + k.")
@click.option("-n", "n", type=int, default=1, show_default=True, help="Pictures; out.png is then their grid, beside "
              "out-0.png, out-1.png ...")
@click.option("--size", type=SIZE, metavar="HxW", help="Height and width in pixels [default: the model's].")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|...")
@click.option("--quantize", metavar="fp16|int8|int4", help="Store the weights of the transformer's blocks in so "
              "many bits.")
@click.option("--threads", type=int, help="CPU threads of the decode [default: as many as its size can use].")
@click.option("-o", "--output", default="out.png", show_default=True, metavar="FILE")
@click.option("--format", "format_name", metavar="png|webp|jpeg", help="[default: by the suffix of --output].")
@click.option("--json", "json_path", metavar="FILE", help="Write seeds, passes, seconds and options there.")
@click.option("--audit", is_flag=True, help="Score the tokens against plain decoding, and say whether they follow its "
              "law.")
@click.option("--trace", "trace_path", metavar="FILE", help="Write the pass at which each token was fixed, over the "
              "picture.")
@click.option("--from", "repeated", is_eager=True, callback=recipe.as_defaults, expose_value=False, metavar="FILE",
              help="Repeat a picture that arimg wrote; options given beside it win.")
@click.pass_context
def command(ctx: click.Context, output: str, format_name: str | None, json_path: str | None, trace_path: str | None,
            model: str, device: str, dtype: str, quantize: str | None, **options: Any) -> None:
    """Paint pictures along control images.

    Prints the names of the files it wrote. Each picture carries the command that made it and its control images: --from
    repeats it.
    """
    from arimg import images
    from arimg.call import check_count

    check_count(options["n"])
    names = _file_names(output, options["n"])
    for name in names:
        images.check_output(name, format_name)
    if trace_path is not None:
        images.check_output(trace_path)
    for option, path in (("--json", json_path), ("--trace", trace_path)):
        if path is not None:
            _check_side_file(option, path, names)
    from arimg.pipeline import Pipeline

    named = () if options["decoder"] is None else (options["decoder"],)
    pipe = Pipeline.from_pretrained(model, device, dtype, quantize=quantize, decoders=named)
    options.update({name: getattr(pipe.settings, name) for name in _MODEL_DEFAULTS if options[name] is None})
    sources, options["control"] = recipe.controls(ctx, options["control"], options["control_from"])
    out = _paint(pipe, options)
    typed = {**options, "model": model, "quantize": quantize, "dtype": str(pipe.dtype).removeprefix("torch.")}
    record = recipe.record(typed, sources, out.maps)
    for name, picture, seeds in _pictures(names, out):
        images.save_image(picture, name, recipe.with_seeds(record, seeds), format_name)
        click.echo(name)
    if trace_path is not None:
        images.save_image(_trace(out), trace_path)
        click.echo(trace_path)
    if options["audit"]:
        click.echo(out.stats.extra["audit"], err=True)
    if json_path is not None:
        recipe.write_json(json_path, _statistics(record, out, names))


def _file_names(output: str, n: int) -> list[str]:
    """`output`, then for several pictures output-0 .. output-(n-1)."""
    path = Path(output)
    return [output] + [str(path.with_name(f"{path.stem}-{k}{path.suffix}")) for k in range(n if n > 1 else 0)]


def _check_side_file(option: str, path: str, names: list[str]) -> None:
    """Raises InputError when the file cannot be written, or would replace a picture."""
    from arimg import images
    from arimg.errors import InputError

    images.check_target(path)
    if Path(path) in map(Path, names):
        other = Path(path).with_suffix(".json") if option == "--json" else Path(path).with_stem("trace")
        raise InputError(f"{option} {path}: a picture goes there; name another file, for example {other}")


def _trace(out: PipelineOutput) -> Any:
    """Raises InputError when the decoder does not report what a trace shows."""
    from arimg.errors import InputError
    from arimg.trace import draw_trace

    if "fixed_at" not in out.stats.extra:
        raise InputError("--trace: this decoder does not report when each token was fixed; leave --trace out")
    return draw_trace(out.images, out.stats.extra["fixed_at"], (out.latents.shape[2], out.latents.shape[3]))


def _paint(pipe: Pipeline, options: dict[str, Any]) -> PipelineOutput:
    given = {name: list(value) if isinstance(value, tuple) and name.startswith("control") else value
             for name, value in options.items() if value is not None and value != ()}
    with Progress() as progress:
        out: PipelineOutput = pipe(on_step=progress, **given)
    return out


def _pictures(names: list[str], out: PipelineOutput) -> list[tuple[str, Any, tuple[int, ...]]]:
    """(file name, picture, seeds in it)."""
    from arimg import images

    singles = [(name, picture, (seed,)) for name, picture, seed in zip(names[1:], out.images, out.seeds)]
    return [(names[0], images.make_grid(out.images), out.seeds), *singles]


def _statistics(record: dict[str, Any], out: PipelineOutput, names: list[str]) -> dict[str, Any]:
    audit = out.stats.extra.get("audit")
    codes_shape = None if out.codes is None else list(out.codes.shape)
    return {"images": names, "seeds": list(out.seeds), "codes_shape": codes_shape,
            "forward_passes": out.stats.forward_passes, "accepted_per_pass": list(out.stats.accepted_per_pass),
            "guarantee": out.stats.extra["guarantee"], "audit": audit and audit.record(), "seconds": out.stats.seconds,
            "figures": {name: value for name, value in out.stats.extra.items() if isinstance(value, (int, float))},
            "options": record["options"]}


class Progress:
    """A bar on stderr that counts tokens."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Callable[[StepInfo], None]:
        return self._update

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _update(self, info: StepInfo) -> None:
        from tqdm import tqdm

        if sys.stderr is None:                              # closed by the shell: 2>&-
            return
        if self._bar is None:
            self._bar = tqdm(total=info.total_tokens, unit="token", file=sys.stderr)
        self._bar.set_postfix(passes=info.forward_pass, refresh=False)
        self._bar.update(info.fixed_tokens - self._bar.n)
