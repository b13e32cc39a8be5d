"""What each decoder costs, on the same pictures, side by side: passes, tokens per pass, seconds, memory, c(W)."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from arimg.accel.ar import PlainAR
from arimg.accel.audit import LIMIT, audit
from arimg.accel.base import Decoder, DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep
from arimg.accel.cost import cost_curve
from arimg.accel.find import needs_network, orders_of, second_network
from arimg.accel.target import Target, branch_scales
from arimg.accel.verify import Verify
from arimg.bench.machine import GemmClock, ReadClock, describe, markdown_table, median, timed
from arimg.bench.memory import peak_memory
from arimg.control.base import build
from arimg.data import load_emoji
from arimg.errors import InputError
from arimg.images import load_image
from arimg.inference import painting
from arimg.pipeline import Pipeline, positions_per_pass, promise
from arimg.quantize import weight_sizes
from arimg.registry import DECODERS
from arimg.threads import cpu_threads, decode_threads

RATE_TURNS = 5          # measurements of the machine's rates
ORACLE = "ar"           # the plain decoder, which the others are compared with
WHITE = 240             # an image token is white when all pixels of its patch are at least this bright

_log = logging.getLogger("arimg")


@dataclass(frozen=True)
class Scene:
    """One picture to paint."""

    control: Any = None                 # a control image, or None
    control_type: str | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class DecoderCost:
    """One decoder at one guidance scale; means over pictures and repeats unless said otherwise."""

    decoder: str
    cfg: float
    guarantee: Guarantee
    passes: float
    tokens_per_pass: float              # tokens of all pictures / passes of all pictures
    tokens_per_pass_non_white: float    # see `tokens_per_pass`
    seconds: float                      # of one picture's tokens: median over the repeats of the mean over pictures
    seconds_min: float                  # the best repeat
    tokens_per_second: float
    pixel_seconds: float                # of one picture's pixels, median
    peak_bytes: int                     # tensors made while the first picture was decoded; see bench/memory.py
    same_as_plain: float | None         # share of pictures with the very codes of plain decoding
    audit_score: float                  # log-likelihood of all pictures' codes, in standard deviations (accel/audit.py)
    audit_lawful: bool                  # whether that score and all scores of every picture are within their limits


@dataclass(frozen=True)
class DecodeReport:
    """What `arimg bench decode` measures. Every picture is a batch of its own."""

    model: str
    machine: str
    dtype: str
    pictures: int
    tokens: int                         # per picture
    repeats: int
    decoders: tuple[DecoderCost, ...]
    pass_seconds: dict[float, dict[int, float]]     # cfg -> W -> seconds of one pass over W positions
    limit_seconds: dict[float, dict[int, float]]    # the same at the machine's limit, see `pass_limits`
    read_rate: float                                # bytes/s
    gemm_rate: float                                # FLOP/s


@dataclass
class _Laps:
    """What one decoder did so far at one guidance scale."""

    results: list[DecodeResult] = field(default_factory=list)       # of all repeats and pictures, in this order
    painted: list[np.ndarray] = field(default_factory=list)         # beside them: bool (L,), the non-white tokens
    seconds: list[list[float]] = field(default_factory=list)        # per repeat and picture
    pixels: list[float] = field(default_factory=list)
    peak_bytes: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on


def held_out_scenes(pipe: Pipeline, data: Path, count: int) -> list[Scene]:
    """Maps of held-out emoji with their classes, in a fixed random order. Raises InputError on an incomplete folder."""
    emoji = load_emoji(data)
    order = np.random.default_rng(0).permutation(np.flatnonzero(emoji.held_out))
    extract, names = build(pipe.control_types[0]), pipe.settings.class_names
    scenes = []
    for index in np.resize(order, count):
        name = emoji.class_names[emoji.labels[index]]
        scenes.append(Scene(extract(Image.fromarray(emoji.images[index])), pipe.control_types[0],
                            name if name in names else None))
    return scenes


def file_scenes(pipe: Pipeline, files: Sequence[str | Path], count: int) -> list[Scene]:
    """Control images from files, again and again until there are enough. Raises InputError."""
    return [Scene(load_image(files[k % len(files)], "control image"), pipe.control_types[0]) for k in range(count)]


def find_scenes(pipe: Pipeline, files: Sequence[str], data: Path, count: int) -> list[Scene]:
    """The given control images; else held-out emoji, if the data set is there; else examples/*.png. A model without
    control needs none. Raises InputError when there is nothing to paint along."""
    if pipe.control is None:
        if files:
            raise InputError(f"--control {files[0]}: this model has no control component; leave it out")
        return [Scene()] * count
    if not files and data.is_dir():
        return held_out_scenes(pipe, data, count)
    files = files or sorted(str(path) for path in Path("examples").glob("*.png"))
    if not files:
        raise InputError(f"no control images: there is no {data}, and no examples folder here; give --control FILE, "
                         "or run `arimg data emoji`")
    return file_scenes(pipe, files, count)


def find_decoders(names: Sequence[str], windows: Sequence[int | str],
                  networks: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Decoder]:
    """Decoders by the names of their rows, plain decoding first; one per window where a decoder has windows; a one-step
    decoder also verified.

    No names = all for codes in raster order that need no further parts than `networks`, the model's by decoder. Raises
    UnknownNameError, and InputError on a decoder that needs parts.
    """
    decoders: dict[str, Decoder] = {}
    raster = [name for name in DECODERS.names() if "raster" in orders_of(DECODERS.load(name))]
    for name in names or sorted(raster, key=lambda name: (name != ORACLE, name)):
        key = second_network(DECODERS.load(name))
        if key is not None:
            decoders |= _one_step(name, networks) if key in networks or names else {}
            continue
        parameters = inspect.signature(DECODERS.load(name)).parameters
        needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty
                  and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]
        if needed and names:
            raise InputError(f"--decoder {name}: needs {', '.join(needed)}, which bench cannot give; leave it out")
        if needed:
            _log.info("decoder %s is left out: it needs %s", name, ", ".join(needed))
        elif "window" in parameters and windows:
            decoders |= {f"{name} W={window}": DECODERS.load(name)(window=window) for window in windows}
        else:
            decoders[name] = DECODERS.load(name)()
    return decoders


def _one_step(name: str, networks: Mapping[str, Any]) -> dict[str, Decoder]:
    """The decoder by itself and as a draft. Raises InputError when its network is missing."""
    factory = DECODERS.load(name)
    key = second_network(factory)
    if key is None or key not in networks:
        raise needs_network(name, "raster")
    one_step: Decoder = factory(networks[key])
    return {name: one_step, f"{name} verified": Verify(one_step)}


class _Capture:
    """Takes the request that a pipeline makes, and decodes nothing."""

    guarantee: Guarantee = "none"
    request: DecodeRequest

    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """Codes of no meaning."""
        self.request = request
        return DecodeResult(DecodeStats(0), torch.zeros(len(request.seeds_B), request.length, dtype=torch.int64,
                                                        device=request.seeds_B.device))


def request_of(pipe: Pipeline, scene: Scene, seed: int, cfg: float) -> DecodeRequest:
    """What the pipeline would have decoded for this picture."""
    capture = _Capture()
    pipe(control=scene.control, control_type=scene.control_type, class_name=scene.class_name, seed=seed, cfg=cfg,
         decoder=capture, lossy=True, output_type="latent")
    return capture.request


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def bench_decode(pipe: Pipeline, model: str, scenes: Sequence[Scene], decoders: dict[str, Decoder],
                 cfgs: Sequence[float], repeats: int = 3) -> DecodeReport:
    """Decode all scenes with all decoders at all guidance scales, `repeats` times, in turns. Picture k has seed k."""
    requests = {cfg: [request_of(pipe, scene, seed, cfg) for seed, scene in enumerate(scenes)] for cfg in cfgs}
    laps = {(name, cfg): _Laps() for cfg in cfgs for name in decoders}
    with tqdm(total=len(laps) * (1 + repeats * len(scenes)), desc="decodes", unit="picture", file=sys.stderr) as bar:
        for (name, cfg), lap in laps.items():               # also the warm-up
            decode = _decode(pipe, decoders[name], requests[cfg][0])
            lap.peak_bytes, _ = peak_memory(pipe.device, decode)
            bar.update()
        for _ in range(repeats):
            for lap in laps.values():
                lap.seconds.append([])
            for picture in range(len(scenes)):
                for (name, cfg), lap in laps.items():
                    _measure(pipe, decoders[name], requests[cfg][picture], lap)
                    bar.update()
    curves = {cfg: _curve(pipe, requests[cfg][0]) for cfg in cfgs}
    reads, gemms = ReadClock(pipe.device), GemmClock(pipe.dtype, pipe.device)
    for clock in (reads, gemms) * RATE_TURNS:
        clock.measure()
    limits = {cfg: pass_limits(pipe.transformer, len(branch_scales(one[0].guidance, one[0].inject_KBLD is not None)),
                               curves[cfg], reads.rate, gemms.rate) for cfg, one in requests.items()}
    costs = tuple(_cost(pipe, name, promise(decoders[name], pipe.transformer), cfg, lap, laps.get((ORACLE, cfg)),
                        requests[cfg])
                  for (name, cfg), lap in laps.items())
    return DecodeReport(model, describe(pipe.device), str(pipe.dtype).removeprefix("torch."), len(scenes),
                        requests[cfgs[0]][0].length, repeats, costs, curves, limits, reads.rate, gemms.rate)


def pass_limits(network: nn.Module, rows: int, widths: Iterable[int], read_rate: float,
                gemm_rate: float) -> dict[int, float]:
    """W -> seconds that a pass over W positions of so many rows takes at least: reading all weights once, or two FLOPs
    per weight and position, whichever is longer. Attention is left out."""
    size, numbers = weight_sizes(network)
    return {width: max(size / read_rate, 2 * rows * width * numbers / gemm_rate) for width in widths}


def _decode(pipe: Pipeline, decoder: Decoder, request: DecodeRequest) -> Callable[[], DecodeResult]:
    threads = decode_threads(pipe.transformer, positions_per_pass(decoder, request))

    def decode() -> DecodeResult:
        with cpu_threads(threads):
            return decoder.decode(Target(pipe.transformer, request), request)
    return decode


def _curve(pipe: Pipeline, request: DecodeRequest) -> dict[int, float]:
    """W -> seconds of a pass, on as many threads as plain decoding takes."""
    with cpu_threads(decode_threads(pipe.transformer, positions_per_pass(PlainAR(), request))):
        return cost_curve(Target(pipe.transformer, request))


def _measure(pipe: Pipeline, decoder: Decoder, request: DecodeRequest, lap: _Laps) -> None:
    """One picture once: tokens, then pixels."""
    seconds, result = timed(pipe.device, _decode(pipe, decoder, request))
    codes_BL = _codes(result)
    with painting(pipe.device, pipe.dtype):
        pixel_seconds, images_B3HW = timed(pipe.device, lambda: pipe.tokenizer.decode_codes(codes_BL, request.grid))
    lap.seconds[-1].append(seconds)
    lap.pixels.append(pixel_seconds)
    lap.results.append(result)
    lap.painted.append(~white_tokens(images_B3HW[0], request.grid))


def _codes(result: DecodeResult) -> Tensor:
    assert result.codes_BL is not None, "a discrete decoder returns codes"
    return result.codes_BL


def _cost(pipe: Pipeline, name: str, guarantee: Guarantee, cfg: float, lap: _Laps, plain: _Laps | None,
          requests: Sequence[DecodeRequest]) -> DecoderCost:
    stats = [result.stats for result in lap.results]
    everywhere = [np.ones_like(mask) for mask in lap.painted]
    passes = float(np.mean([one.forward_passes for one in stats]))
    means = [float(np.mean(repeat)) for repeat in lap.seconds]
    same = None
    if plain is not None:
        same = float(np.mean([torch.equal(_codes(ours), _codes(theirs))
                              for ours, theirs in zip(lap.results, plain.results)]))
    score, lawful = _audit(pipe, lap, requests)
    return DecoderCost(name, cfg, guarantee, passes, tokens_per_pass(stats, everywhere),
                       tokens_per_pass(stats, lap.painted), median(means), min(means),
                       requests[0].length / median(means), median(lap.pixels), lap.peak_bytes, same, score, lawful)


def _audit(pipe: Pipeline, lap: _Laps, requests: Sequence[DecodeRequest]) -> tuple[float, bool]:
    """(score, lawful) of all pictures of the first repeat. Scores are standard normal; so is their sum / sqrt(n)."""
    reports = [audit(pipe.transformer, request, _codes(result)) for request, result in zip(requests, lap.results)]
    score = sum(report.likelihood for report in reports) / len(reports) ** 0.5
    return score, abs(score) <= LIMIT and all(report.lawful for report in reports)


def white_tokens(image_3HW: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Bool (L,): whether all pixels of a token's patch are WHITE or brighter. Image in [-1, 1]."""
    darkest_HW = (127.5 * image_3HW.float() + 128).amin(0)
    height, width = grid
    patches = darkest_HW.unflatten(0, (height, -1)).unflatten(-1, (width, -1))
    return (patches.amin(dim=(1, 3)) >= WHITE).flatten().cpu().numpy()


def fixed_at(stats: DecodeStats, length: int) -> np.ndarray:
    """(L,) number of the pass that fixed each token of a single picture; raster order unless the decoder says more."""
    if "fixed_at" in stats.extra:
        return np.asarray(stats.extra["fixed_at"][0])
    counts = np.asarray(stats.accepted_per_pass).round().astype(int)
    passes = np.repeat(np.arange(len(counts)) + 1, counts)
    assert len(passes) == length, (len(passes), length)
    return passes


def tokens_per_pass(stats: Sequence[DecodeStats], masks: Sequence[np.ndarray]) -> float:
    """Tokens inside the masks (bool (L,), one per picture) / passes spent on them; nan when there are none.

    A pass that fixed m tokens counts 1/m for each of them, so that the shares of all tokens sum to the passes.
    """
    spent = 0.0
    for one, mask in zip(stats, masks):
        passes = fixed_at(one, len(mask))
        spent += float((1 / np.bincount(passes)[passes])[mask].sum())
    count = sum(int(mask.sum()) for mask in masks)
    return count / spent if count else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# The page


_COLUMNS = ("decoder", "cfg", "guarantee", "passes", "tokens/pass", "non-white", "s/picture", "min", "speed-up",
            "tokens/s", "pixels, s", "peak, MB", "= ar", "audit")


def to_markdown(report: DecodeReport) -> str:
    """The report as a page."""
    plain = {cost.cfg: cost.seconds for cost in report.decoders if cost.decoder == ORACLE}
    curves = [[f"{cfg:g}", *(f"{seconds / curve[1]:.2f}" for seconds in curve.values()), f"{curve[1] * 1e3:.1f}"]
              for cfg, curve in report.pass_seconds.items()]
    widths = next(iter(report.pass_seconds.values()))
    shares = [[f"{cfg:g}", *(f"{report.limit_seconds[cfg][width] / seconds:.0%}" for width, seconds in curve.items())]
              for cfg, curve in report.pass_seconds.items()]
    return "\n".join([
        f"# {report.model}: decoders side by side", "",
        f"{report.pictures} pictures of {report.tokens} tokens, one at a time, {report.repeats} repeats in turns; "
        f"{report.dtype}; {report.machine}.", "",
        markdown_table(_COLUMNS, [_row(cost, plain.get(cost.cfg)) for cost in report.decoders]), "",
        "c(W), the cost of a pass over W positions relative to W = 1:", "",
        markdown_table(["cfg", *map(str, widths), "W = 1, ms"], curves), "",
        f"The same passes as a share of the machine's limit (reading 1 GiB: {report.read_rate / 1e9:.1f} GB/s; GEMM "
        f"1024x1024x1024: {report.gemm_rate / 1e9:.1f} GFLOP/s):", "",
        markdown_table(["cfg", *map(str, widths)], shares)])


def _row(cost: DecoderCost, plain_seconds: float | None) -> list[str]:
    speed_up = "" if plain_seconds is None else f"{plain_seconds / cost.seconds:.2f}x"
    same = "" if cost.same_as_plain is None else f"{cost.same_as_plain:.0%}"
    return [f"`{cost.decoder}`", f"{cost.cfg:g}", cost.guarantee, f"{cost.passes:.1f}", f"{cost.tokens_per_pass:.2f}",
            f"{cost.tokens_per_pass_non_white:.2f}", f"{cost.seconds:.3f}", f"{cost.seconds_min:.3f}", speed_up,
            f"{cost.tokens_per_second:.0f}", f"{cost.pixel_seconds:.3f}", f"{cost.peak_bytes / 1e6:.1f}", same,
            f"{cost.audit_score:+.3g}{'' if cost.audit_lawful else ', NOT the law'}"]
