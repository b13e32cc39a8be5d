"""MAR as its authors wrote it, from a checkout that the user has, beside ours: steps of generation with the same
weights, on the same canvas. None of its files is changed, and none is needed to use arimg."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from arimg.accel.base import DecodeRequest, Guidance, Sampling
from arimg.accel.contexts import Network, Tokens, head_noise, open_plan
from arimg.accel.plan import Plan, guidance_scales
from arimg.bench.machine import GemmClock, count_flops, describe, top_operators
from arimg.bench.side_by_side import CPU, OURS, THEIRS, Comparison, Phases, Side, compare
from arimg.checkpoints import load_state
from arimg.config import from_dict
from arimg.errors import InputError
from arimg.inference import lay_out
from arimg.interop.mar import mar_config_from_original
from arimg.models.base import Condition
from arimg.models.mar import MARConfig, MARTransformer
from arimg.presets import MAR_PRESETS, MARPreset

_PACKAGES = ("diffusion", "models")         # the checkout's; the second has no __init__.py
CLASS_ID = 7


def load_mar(folder: str | Path) -> ModuleType:
    """The module `models.mar` of a checkout of github.com/LTH14/mar. Raises InputError."""
    root = Path(folder).expanduser()
    missing = [name for name in ("models/mar.py", "models/diffloss.py", "diffusion/__init__.py")
               if not (root / name).is_file()]
    if missing:
        raise InputError(f"--mar {folder}: has no {missing[0]}; give a checkout of github.com/LTH14/mar")
    try:
        with _importable(root):
            return import_module("models.mar")
    except ModuleNotFoundError as error:
        raise InputError(f"--mar {folder}: its code needs {error.name}; type: pip install {error.name}") from None


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """The checkout's folders as top-level packages, for as long as the block lasts."""
    try:
        for name in _PACKAGES:
            init, places = root / name / "__init__.py", [str(root / name)]
            spec = spec_from_file_location(name, init, submodule_search_locations=places)
            assert spec is not None and spec.loader is not None
            package = sys.modules[name] = module_from_spec(spec)
            if init.is_file():
                spec.loader.exec_module(package)
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
            del sys.modules[name]


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Inside the block `.cuda()`, which the original calls in a dozen places, leaves a tensor where it is."""
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self         # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original                        # type: ignore[method-assign]


@dataclass(frozen=True)
class MARPair:
    """The original's network and ours, with the same weights."""

    theirs: nn.Module
    ours: MARTransformer

    def request(self, steps: int, cfg: float, temperature: float = 1.0) -> DecodeRequest:
        """One picture."""
        side = self.ours.config.grid
        return DecodeRequest(Condition(class_ids_B=torch.tensor([CLASS_ID])), (side, side), torch.tensor([0]),
                             guidance=Guidance(cfg), sampling=Sampling(temperature), steps=steps)

    def canvas(self) -> Tensor:
        """canvas_1LC that every step begins with; what it does not know yet, neither side reads."""
        shape = (1, self.ours.config.grid ** 2, self.ours.channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2))

    def our_step(self, network: Network, step: int) -> Tensor:
        """latents_NC of the tokens that a step predicts."""
        return network.draw(self.canvas(), torch.tensor([[step]])).sample.latents_NC

    def their_step(self, request: DecodeRequest, plan: Plan, step: int) -> Tensor:
        """The same as the original's loop does it: both branches through the transformer, and both through the head
        until the last noise has gone. It draws its noise itself, but the start, which is ours."""
        steps_11 = torch.tensor([[step]])
        masked_BL = (~plan.known(steps_11)[:, 0]).float().repeat(2, 1)
        predicted_BL = plan.predicted(steps_11)[:, 0]
        positions_N = predicted_BL[0].nonzero()[:, 0]
        tokens = Tokens(torch.zeros_like(positions_N), torch.zeros_like(positions_N), positions_N)
        scale = guidance_scales(request, plan, "linear", tokens.images_N, torch.full_like(positions_N, step),
                                positions_N, torch.float32)[0, 0]
        net: Any = self.theirs
        class_rows = torch.cat([net.class_emb(torch.tensor([CLASS_ID])), net.fake_latent])
        z_BLD = net.forward_mae_decoder(
            net.forward_mae_encoder(self.canvas().repeat(2, 1, 1), masked_BL, class_rows), masked_BL)
        start_NC = head_noise(request, tokens, cast(int, self.ours.head.draws), self.ours.channels)[:, 0].repeat(2, 1)
        with _on_the_cpu():
            both_NC: Tensor = net.diffloss.gen_diffusion.p_sample_loop(
                net.diffloss.net.forward_with_cfg, start_NC.shape, start_NC, clip_denoised=False,
                model_kwargs={"c": z_BLD[predicted_BL.repeat(2, 1)], "cfg_scale": scale},
                temperature=request.sampling.temperature)
        return both_NC[:len(positions_N)]


def mar_pair(original: ModuleType, layers: int | None = None) -> MARPair:
    """MAR-B with random weights, the same in both, in eval mode; ours laid out as a pipeline does it. `layers`: fewer
    blocks on each side than the preset has."""
    sizes = sizes_of(MAR_PRESETS["B"], layers)
    theirs = original.MAR(norm_layer=partial(nn.LayerNorm, eps=1e-6), **sizes)
    generator = torch.Generator().manual_seed(0)
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1 and ("adaLN" in name or "final_layer" in name):      # zero at the beginning of training
            nn.init.normal_(weight, std=0.02, generator=generator)
    ours = MARTransformer(from_dict(MARConfig, mar_config_from_original(sizes)))
    load_state(ours, theirs.state_dict(), "the original's weights")
    for weight in ours.parameters():
        weight.data = weight.data.clone()
    lay_out(ours.eval())
    return MARPair(theirs.eval(), ours)


def sizes_of(preset: MARPreset, layers: int | None = None) -> dict[str, Any]:
    """A preset as arguments of the original's class."""
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("embed_dim", preset.dim), ("depth", layers or preset.layers), ("num_heads", preset.heads))}
    return {**sides, "diffloss_d": preset.head_layers, "diffloss_w": preset.head_width, "num_sampling_steps": "100"}


def timed_steps(steps: int) -> list[int]:
    """The first step, the last one, and two between."""
    return sorted({round(share * (steps - 1)) for share in (0, 1 / 3, 2 / 3, 1)})


@torch.no_grad()
def bench_generation(pair: MARPair, steps: int, cfg: float, turns: int) -> Comparison:
    """Steps of the generation of one picture in `steps` steps."""
    request = pair.request(steps, cfg)
    plan, _ = open_plan(pair.ours, request)
    chosen = timed_steps(steps)
    runs: dict[str, Phases] = {THEIRS: {f"step {step + 1}": partial(pair.their_step, request, plan, step)
                                        for step in chosen}}
    network = Network(pair.ours, request, plan, "linear", last_noise=False)
    runs[OURS] = {f"step {step + 1}": partial(pair.our_step, network, step) for step in chosen}
    flops = count_flops(lambda: [work() for work in runs[OURS].values()])
    clock = GemmClock(torch.float32, CPU)
    laps = compare(runs, [clock.measure], turns)
    best = flops / clock.cpu_rate
    sides = tuple(Side(name, laps[name], best / laps[name]["whole"].cpu_seconds,
                       top_operators(list(phases.values())[len(phases) // 2], CPU)) for name, phases in runs.items())
    return Comparison(
        f"MAR, {len(chosen)} of {steps} steps of generation, guidance {cfg:g}, batch 1, float32", describe(CPU), turns,
        f"{flops / 1e9:.0f} GFLOP in these steps; GEMM 1024x1024x1024, per thread: {clock.cpu_rate / 1e9:.1f} GFLOP/s",
        f"largest difference of a token's number from the original's, without noise, as a share of the largest: "
        f"{_difference(pair, steps, cfg, chosen[len(chosen) // 2]):.1e}", sides)


def _difference(pair: MARPair, steps: int, cfg: float, step: int) -> float:
    """Of what one step draws at temperature 0, where both start from the same noise and add none."""
    request = pair.request(steps, cfg, temperature=0.0)
    plan, _ = open_plan(pair.ours, request)
    theirs_NC = pair.their_step(request, plan, step)
    ours_NC = pair.our_step(Network(pair.ours, request, plan, "linear", last_noise=False), step)
    return float((ours_NC - theirs_NC).abs().max() / theirs_NC.abs().max())
