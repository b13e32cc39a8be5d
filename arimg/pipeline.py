"""The road from a condition to pixels: control images and a class or caption in, tokens and pictures out."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arimg import images
from arimg.accel.audit import audit, teacher_forced
from arimg.accel.base import (DecodeRequest, DecodeResult, DecodeStats, Guarantee, Guidance, OnStep, Sampling, StepInfo,
                              token_scales)
from arimg.accel.find import find_decoder, second_network
from arimg.accel.scale import latent_map
from arimg.accel.target import Target, branch_scales
from arimg.backends import EXPORTED
from arimg.call import CallOptions, call_options, checked_size, image_seeds
from arimg.checkpoints import SECOND, PipelineSettings, find_model, load_component, read_index, save_pipeline
from arimg.conditions import ControlMap, condition_of, control_maps, log, repeat_condition, repeat_rows
from arimg.control.fusion import combine
from arimg.devices import find_device, find_dtype, synchronize
from arimg.errors import CheckpointError, InputError
from arimg.fit import check_fit
from arimg.inference import lay_out, painting
from arimg.models.base import order_of
from arimg.models.text import TextEncoder
from arimg.quantize import check_quantize
from arimg.quantize import quantize as quantized
from arimg.registry import DECODERS
from arimg.threads import cpu_threads, decode_threads


class PipelineOutput(NamedTuple):
    """What a call returns; `output[0]` is `output.images`, as in diffusers."""

    images: Any                     # PIL list; (B, H, W, 3) array or (B, 3, H, W) tensor in [0, 1]; or latents
    codes: Tensor | None            # codes_BL, all scales in one row; None where tokens are continuous
    latents: Tensor                 # latents_BChw, what the tokenizer's decoder reads
    stats: DecodeStats
    maps: tuple[Tensor, ...]        # per control (1 or B, 3, H, W) in [-1, 1], as the model saw it
    seeds: tuple[int, ...]          # per picture


class Pipeline:
    """Tokenizer, transformer and, as the model has them, control component, text encoder and the networks that single
    decoders need: `decoders`, by the decoder's name.

        pipe = Pipeline.from_pretrained("emoji")
        pipe(control="canny.png", class_name="fluent/animals", seeds=[0, 1, 2, 3]).images[0].save("cat.png")

    A pipeline holds no state between calls.
    """

    def __init__(self, tokenizer: Any, transformer: Any, control: Any = None, text: TextEncoder | None = None,
                 settings: PipelineSettings = PipelineSettings(), decoders: Mapping[str, Any] | None = None) -> None:
        """Raises CheckpointError when the parts do not fit together."""
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.control = control
        self.text = text
        self.settings = settings
        self.decoders = dict(decoders or {})
        check_fit(tokenizer, transformer, control, self.decoders)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str | torch.device = "auto",
                        dtype: str | torch.dtype = "auto", revision: str | None = None, local_files_only: bool = False,
                        text: bool = True, quantize: str | None = None,
                        decoders: Collection[str] | None = None) -> "Pipeline":
        """Load an embedded model by its name, a pipeline folder, or a hub id.

        `dtype` "auto" is bfloat16 on CUDA, else float32. The tokenizer keeps at least float32; on a CPU with units for
        bfloat16 it paints in that if it is given. Of an exported model (arimg/export.py) `dtype` is what OpenVINO may
        multiply in. `text=False` leaves the text encoder out; captions are then given as `prompt_embeds`. `quantize`
        "fp16", "int8" or "int4" stores the weights of the transformer's blocks so; such a pipeline is not saved.
        `decoders`: names of those whose own networks are loaded, beside the model's own decoder; None = all.
        Raises UnknownNameError, CheckpointError, InputError (device, dtype), MissingExtraError (text encoder).
        """
        check_quantize(quantize)
        folder = find_model(name_or_path, revision, local_files_only)
        index = read_index(folder)
        exported = any(class_name in EXPORTED for _, class_name in index.components.values())
        place = find_device("cpu" if exported and device == "auto" else device)
        kind = find_dtype(dtype, place)
        for name in ("tokenizer", "transformer"):
            if name not in index.components:
                raise CheckpointError(f"{folder}: model_index.json names no {name}, without which nothing is painted")
        encoder = None
        if text and "text_encoder" in index.components:
            encoder = TextEncoder.from_folder(folder / "text_encoder", folder / "text_tokenizer", kind, place)
        transformer = load_component(folder / "transformer", kind, place)
        if quantize is not None:
            transformer = quantized(transformer, quantize)
        tokenizer = load_component(folder / "tokenizer", kind if exported else _at_least_float32(kind), place)
        wanted = set(index.second_networks)
        if decoders is not None:
            wanted &= {second_network(DECODERS.load(name)) for name in {*decoders, index.settings.decoder}}
        own_kind = next(transformer.parameters()).dtype         # an exported transformer's is float32
        pipeline = cls(tokenizer, transformer,
                       load_component(folder / "control", own_kind, place) if "control" in index.components else None,
                       encoder, index.settings,
                       {name: load_component(folder / SECOND / name, kind, place) for name in sorted(wanted)})
        pipeline._lay_out()
        return pipeline

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a pipeline folder, or nothing. Raises CheckpointError."""
        return save_pipeline(folder, self.components, self.settings)

    @property
    def components(self) -> dict[str, Any]:
        """Sub-folder name -> part, those that the pipeline has."""
        parts = {"tokenizer": self.tokenizer, "transformer": self.transformer, "control": self.control,
                 **{SECOND + name: network for name, network in self.decoders.items()}}
        if self.text is not None:
            parts |= {"text_encoder": self.text.model, "text_tokenizer": self.text.tokenizer}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def device(self) -> torch.device:
        """Where the transformer lies."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's precision."""
        return next(self.transformer.parameters()).dtype

    @property
    def control_types(self) -> tuple[str, ...]:
        """The types of control image that the model was trained on."""
        if self.control is None:
            return ()
        return self.settings.control_types or tuple(self.control.config.types)

    def to(self, *targets: str | torch.device | torch.dtype) -> "Pipeline":
        """Move all networks to a device, a dtype or both (`pipe.to("cuda", torch.bfloat16)`). Returns the pipeline."""
        for name, part in self.components.items():
            for target in targets if isinstance(part, torch.nn.Module) else ():
                if isinstance(target, torch.dtype):
                    part.to(_at_least_float32(target) if name == "tokenizer" else target)
                else:
                    part.to(find_device(target))
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        painters = (self.transformer, getattr(self.tokenizer, "decoder", self.tokenizer), self.control)
        for network in (*painters, *self.decoders.values()):
            if network is not None:
                lay_out(network)

    @torch.no_grad()
    def __call__(self, control: Any = None, **options: Any) -> Any:
        """Paint pictures. Keywords: the fields of `arimg.call.CallOptions`, and its DIFFUSERS_NAMES.

        A picture depends on the options and on its own seed, not on what else is in the batch. Returns a
        PipelineOutput, or the tuple (images,) with return_dict=False. Raises InputError, UnknownNameError and
        MissingExtraError, each with one line that says what to give instead.
        """
        call = call_options({"control": control, **options}, self.settings)
        check_fit(self.tokenizer, self.transformer, self.control, self.decoders)
        decoder = find_decoder(call.decoder, self.transformer, self.decoders, call.window, call.lossy, call.verify)
        if call.audit and order_of(self.transformer) == "continuous":
            raise InputError("audit: these tokens are continuous, and only codes are scored; leave it out")
        clock = _Clock(self.device)
        request, maps = self._request(call)
        clock.lap("control")
        with cpu_threads(call.threads or decode_threads(self.transformer, positions_per_pass(decoder, request))):
            result = decoder.decode(Target(self.transformer, request), request, self._on_step(call))
        clock.lap("tokens")
        latents_BChw = _latents(result, request).to(_at_least_float32(self.dtype))
        pictures = latents_BChw
        if call.output_type != "latent":
            pictures = _pictures(self._painted(result, latents_BChw), call.output_type)
        clock.lap("pixels")
        extra = {**result.stats.extra, "guarantee": promise(decoder, self.transformer)}
        if call.audit:
            assert result.codes_BL is not None
            extra["audit"] = audit(self.transformer, request, result.codes_BL)
            clock.lap("audit")
        stats = replace(result.stats, seconds=clock.seconds, extra=extra)
        output = PipelineOutput(pictures, result.codes_BL, latents_BChw, stats, tuple(one.maps_R3HW for one in maps),
                                tuple(request.seeds_B.tolist()))
        return output if call.return_dict else (output.images,)

    @torch.no_grad()
    def nll(self, codes: Any, **options: Any) -> Tensor:
        """nll_BL in nats: minus the log probability of each of the codes (L) or (B, L), given those before it, in a
        call with these options. Guidance, temperature and filters count; cfg=1 asks for the model's own law. Raises
        InputError as a call does."""
        request, _ = self._request(call_options(options, self.settings))
        codes_BL = self._given_codes("codes", codes, (len(request.seeds_B), request.length))
        if codes_BL is None or int(codes_BL.min()) < 0:
            raise InputError("nll: give a code for every token")
        p_BL = [p_BWV.gather(-1, codes_BL.gather(1, positions_BW)[..., None])[..., 0]
                for positions_BW, p_BWV in teacher_forced(self.transformer, request, codes_BL)]
        return -torch.cat(p_BL, dim=1).log()

    def _request(self, call: CallOptions) -> tuple[DecodeRequest, list[ControlMap]]:
        """What is to be decoded, and the control maps it was made from."""
        guidance = _guidance(call)
        sampling = Sampling(call.temperature, call.top_k, call.top_p)
        size, space = self._size(call), self.tokenizer.space()
        grid = (size[0] // self.tokenizer.stride, size[1] // self.tokenizer.stride)
        length = sum(height * width for height, width in token_scales(space, grid))
        if self.control is None and (call.control is not None or call.control_from is not None):
            raise InputError("a control image is given, but this model has no control component; leave it out, or "
                             "choose another model")
        maps = control_maps(call, self.control_types, size)
        condition = condition_of(call, self.transformer, self.settings.class_names, self.text)
        seeds = image_seeds(call, max([condition.rows, *(len(one.maps_R3HW) for one in maps)]))
        request = DecodeRequest(
            condition=repeat_condition(condition, call.n, len(seeds)), grid=grid,
            seeds_B=torch.tensor(seeds, device=self.device), inject_KBLD=self._inject(maps, call.n, len(seeds)),
            guidance=guidance, sampling=sampling, space=space,
            forced_BL=self._given_codes("forced", call.forced, (len(seeds), length)),
            forced_BLC=self._given_latents(call.forced_latents, (len(seeds), *grid)),
            draft_BL=self._given_codes("draft", call.draft, (len(seeds), length)), steps=call.steps)
        return request, maps

    def _size(self, call: CallOptions) -> tuple[int, int]:
        stride, space = self.tokenizer.stride, self.tokenizer.space()
        height, width = checked_size(call.size, stride)
        if space is not None and space.scales is not None and (height, width) != _pixels(space.scales[-1], stride):
            own = "x".join(map(str, _pixels(space.scales[-1], stride)))
            raise InputError(f"size {height}x{width}: the scales of this model end at {own} pixels; give --size {own}")
        if (height, width) != self.settings.size:
            log.warning("size %dx%d: the model was trained at %dx%d, so the picture may be weaker", height, width,
                        *self.settings.size)
        return height, width

    def _inject(self, maps: list[ControlMap], each: int, rows: int) -> Tensor | None:
        """inject_KBLD of all controls; a map that several pictures share is encoded once."""
        if not maps:
            return None
        space, injects = self.tokenizer.space(), []
        scales = None if space is None else space.scales
        for one in maps:
            maps_R3HW = one.maps_R3HW.to(self.device, self.dtype)
            type_ids_R = None
            if self.control.config.reads_type:
                type_id = self.control.type_id(one.type.name)
                type_ids_R = torch.full((len(maps_R3HW),), type_id, device=self.device)
            inject_KRLD = self.control.inject(maps_R3HW, one.type.resample, type_ids_R, scales)
            injects.append(repeat_rows(inject_KRLD, each, rows, dim=1))
        sizes = None if scales is None else [height * width for height, width in scales]
        strengths, starts, ends = zip(*((one.scale, one.start, one.end) for one in maps))
        return combine(injects, strengths, starts, ends, sizes)

    def _painted(self, result: DecodeResult, latents_BChw: Tensor) -> Tensor:
        """images_B3HW of a decode."""
        with painting(self.device, self.dtype):
            if result.latents_BLC is None:
                return self.tokenizer.decode_codes(result.codes_BL, (latents_BChw.shape[2], latents_BChw.shape[3]))
            return self.tokenizer.decode(latents_BChw)

    def _given_codes(self, name: str, codes: Any, shape: tuple[int, int]) -> Tensor | None:
        """codes_BL given by the caller, one row for all pictures or one for each; -1 = free. Raises InputError."""
        if codes is None:
            return None
        if self.tokenizer.space() is None:
            raise InputError(f"{name}: the tokens of this model are continuous, so it takes no codes; leave it out")
        codes_BL = torch.as_tensor(codes, device=self.device)
        codes_BL = codes_BL[None] if codes_BL.ndim == 1 else codes_BL
        if codes_BL.shape not in (shape, (1, shape[1])) or codes_BL.is_floating_point():
            raise InputError(f"{name} is {codes_BL.dtype} of shape {tuple(codes_BL.shape)}; give whole numbers of "
                             f"shape {shape} or ({shape[1]},)")
        low, high = int(codes_BL.min()), int(codes_BL.max())
        if low < -1 or high >= self.transformer.vocab_size:
            raise InputError(f"{name} holds codes from {low} to {high}; the codes are 0 to "
                             f"{self.transformer.vocab_size - 1}, and -1 where the model is free")
        return codes_BL.long().expand(shape)

    def _given_latents(self, latents: Any, shape: tuple[int, int, int]) -> Tensor | None:
        """canvas_BLC given by the caller as a map, one for all pictures or one for each; NaN = free. Raises
        InputError."""
        if latents is None:
            return None
        if self.tokenizer.space() is not None:
            raise InputError("forced_latents is for models with continuous tokens; give this one codes: forced")
        batch, height, width = shape
        channels = self.tokenizer.token_channels
        maps_BChw = torch.as_tensor(latents, device=self.device)
        maps_BChw = maps_BChw[None] if maps_BChw.ndim == 3 else maps_BChw
        if maps_BChw.shape not in ((batch, channels, height, width), (1, channels, height, width)):
            raise InputError(f"forced_latents has shape {tuple(maps_BChw.shape)}; give ({channels}, {height}, {width}) "
                             "or one such map for each picture")
        return maps_BChw.expand(batch, -1, -1, -1).flatten(2).mT

    def _on_step(self, call: CallOptions) -> OnStep | None:
        """Our callback and that of diffusers as one."""
        ours, theirs = call.on_step, call.callback_on_step_end
        if theirs is None:
            return ours

        def both(info: StepInfo) -> None:
            if ours is not None:
                ours(info)
            theirs(self, info.forward_pass - 1, info.fixed_tokens, {"codes": info.codes_BL})
        return both


def _guidance(call: CallOptions) -> Guidance:
    """That of a call. Without a class or caption the branches with and without one are the same, so only the control is
    guided, in two branches."""
    guidance = Guidance(call.cfg, call.control_cfg, call.cfg_interval, call.guidance_order, call.plausibility)
    if any(given is not None for given in (call.class_name, call.class_id, call.prompt, call.prompt_embeds)):
        return guidance
    if call.control is None and call.control_from is None:
        return replace(guidance, cfg=1.0, control_cfg=None)
    return replace(guidance, cfg=call.cfg if call.control_cfg is None else call.control_cfg, control_cfg=None)


def promise(decoder: Any, transformer: Any) -> Guarantee:
    """What the decoder promises; where wide passes of the network have other laws, codes are the same only nearly. With
    activations of 16 bits they have: a sum in another order is rounded to another number."""
    guarantee: Guarantee = decoder.guarantee
    rounds = torch.finfo(next(transformer.parameters()).dtype).bits < 32
    if guarantee == "same-codes" and (rounds or not getattr(transformer, "exact", True)):
        return "tolerance"
    return guarantee


def _latents(result: DecodeResult, request: DecodeRequest) -> Tensor:
    """latents_BChw that the tokenizer's decoder reads: the tokens themselves, or the vectors of their codes."""
    latents_BLC = result.latents_BLC
    if latents_BLC is None:
        assert result.codes_BL is not None and request.space is not None
        latents_BLC = request.space.codebook_VC[result.codes_BL]
    return latent_map(latents_BLC, request.grid, request.space)


def positions_per_pass(decoder: Any, request: DecodeRequest) -> int:
    """That a pass reads in all rows, at most."""
    branches = len(branch_scales(request.guidance, request.inject_KBLD is not None))
    window = getattr(getattr(decoder, "window", None), "widest", 1)
    whole = order_of(decoder) != "raster" or second_network(decoder) is not None
    width = request.length if whole else min(window, request.length)
    return len(request.seeds_B) * branches * width


def _pixels(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    return grid[0] * stride, grid[1] * stride


def _at_least_float32(kind: torch.dtype) -> torch.dtype:
    return torch.promote_types(kind, torch.float32)


def _pictures(images_B3HW: Tensor, output_type: str) -> Any:
    """Pictures of [-1, 1] in the form asked for."""
    if output_type == "pil":
        return [images.to_pil(image_3HW) for image_3HW in images_B3HW]
    scaled_B3HW = (images_B3HW.float() / 2 + 0.5).clamp(0, 1)
    return scaled_B3HW if output_type == "pt" else scaled_B3HW.permute(0, 2, 3, 1).cpu().numpy()


class _Clock:
    """Seconds per stage; the device is waited for at each lap."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 6)
        self._last = now
