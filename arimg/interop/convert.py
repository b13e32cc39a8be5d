"""`arimg convert`: original files in, a pipeline folder out. Files are recognised by their keys; every key must fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arimg.checkpoints import SECOND, PipelineSettings, load_state, save_pipeline
from arimg.config import from_dict
from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.control.fusion import injection_layers
from arimg.errors import CheckpointError, InputError, UnknownNameError
from arimg.interop.controlar import control_config_from_controlar, encoder_sizes, encoder_state, split_controlar
from arimg.interop.dd1 import infer_ar_student_config, infer_var_student_config, is_student, student_from_dd
from arimg.interop.files import OriginalFile, Weights, read_original
from arimg.interop.kl import infer_kl_config, is_kl, kl_from_ldm
from arimg.interop.llamagen import infer_ar_config, is_transformer, transformer_from_llamagen
from arimg.interop.mar import infer_mar_config, is_mar
from arimg.interop.var import infer_var_config, is_var, transformer_from_var
from arimg.interop.var_vae import infer_multiscale_config, is_var_vae, multiscale_from_var
from arimg.interop.vq import infer_vq_config, is_vq, vq_from_llamagen
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.mar import MARConfig, MARTransformer
from arimg.models.students import ARStudent, ARStudentConfig
from arimg.models.text import TextEncoder
from arimg.models.var import VARConfig, VARTransformer
from arimg.models.var_students import VARStudent, VARStudentConfig
from arimg.presets import (AR_PRESETS, CONTROLAR, DISTILLED, LLAMAGEN, MAR, MAR_PRESETS, PUBLISHED, STUDENT_PASSES, VAR,
                           VAR_PRESETS, Family)
from arimg.registry import CONTROLS
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.tokenizers.multiscale import MultiscaleTokenizer
from arimg.tokenizers.vq import VQTokenizer

Notify = Callable[[str], None]
Components = dict[str, Any]
Recognisers = dict[str, Callable[[dict[str, Tensor]], bool]]

DEFAULT_IMAGE_SIZE = 256
_POINTS = 3                                                     # ControlAR's injection points
_BLOCK = "condition_mlp.uncond_embedding"                       # ControlAR: one row per cell of the rotary table
_PATCHES = "embeddings.patch_embeddings.projection.weight"      # every Hugging Face ViT has it


@dataclass(frozen=True)
class Options:
    """What the files do not say."""

    preset: str | None = None                       # a name in presets.AR_PRESETS, VAR_PRESETS or MAR_PRESETS
    heads: int | None = None                        # of the transformer, for sizes without a preset
    encoder_heads: int | None = None                # of the control encoder; None = width / 64
    image_size: int | None = None                   # pixels per side
    class_names: tuple[str, ...] = ()
    control_types: tuple[str, ...] = ("canny",)     # what the control weights were trained on
    text_encoder: Path | None = None                # folder of the T5 encoder and its tokenizer
    dtype: torch.dtype | None = None                # of everything written; None = as in the files

    def transformer_heads(self, presets: Mapping[str, Any] = AR_PRESETS) -> int | None:
        """Heads as given, or those of the preset. Raises UnknownNameError."""
        if self.preset is None or self.heads is not None:
            return self.heads
        if self.preset not in presets:
            raise UnknownNameError("preset", self.preset, presets)
        heads: int = presets[self.preset].heads
        return heads


@dataclass(frozen=True)
class Files:
    """The original files of one model, by what they hold."""

    tokenizer: OriginalFile
    transformer: OriginalFile                       # control weights included, if there are any
    encoder: OriginalFile | None = None
    student: OriginalFile | None = None             # of Distilled Decoding

    @property
    def controlled(self) -> bool:
        """Whether the transformer's file also holds ControlAR's weights."""
        return _is_controlar(self.transformer.state)


Converter = Callable[[Files, Options, Notify], tuple[Components, PipelineSettings]]


def convert(source: str, files: Sequence[str | Path], out: str | Path, *, preset: str | None = None,
            heads: int | None = None, encoder_heads: int | None = None, image_size: int | None = None,
            class_names: Sequence[str] = (), control_types: Sequence[str] = ("canny",),
            text_encoder: str | Path | None = None, weights: Weights = "model", dtype: torch.dtype | None = None,
            notify: Notify = lambda line: None) -> Path:
    """Write a pipeline folder `out` from the files of one model, in any order; `notify` gets lines for the user.

    `source` is a key of CONVERTERS. `image_size` (pixels per side) sizes the rotary table, which LlamaGen's files do
    not tell. `text_encoder`: folder of the FLAN-T5 that a text-conditional model reads captions through, to be copied
    into `out`. `dtype` casts all weights. Nothing is written on an error: CheckpointError (file missing, damaged,
    unsafe, of an unknown kind, or keys that do not fit), ConfigError, InputError or UnknownNameError.
    """
    if source not in CONVERTERS:
        raise UnknownNameError("kind of original weights", source, CONVERTERS)
    options = Options(preset, heads, encoder_heads, image_size, tuple(class_names), tuple(control_types),
                      None if text_encoder is None else Path(text_encoder), dtype)
    for name in options.control_types:
        CONTROLS.check(name)
    originals = [read_original(path, weights) for path in files]
    for notice in (notice for original in originals for notice in original.notices):
        notify(notice)
    if weights == "ema" and not any(original.weights == "ema" for original in originals):
        raise CheckpointError(f"{_names(originals)}: no EMA weights there; use --weights model")
    components, settings = CONVERTERS[source](_sort(originals, source), options, notify)
    components |= _text_parts(components["transformer"].config, options, notify)
    return save_pipeline(out, components, settings, dtype)


def _sort(originals: Sequence[OriginalFile], source: str) -> Files:
    """Recognise each file by its keys. Raises CheckpointError on what is unknown, doubled or missing."""
    found: dict[str, OriginalFile] = {}
    for original in originals:
        kind = next((name for name, fits in _KINDS.items() if fits(original.state)), None)
        if kind is None:
            raise CheckpointError(f"{original.path}: neither of {', '.join(_KINDS)}; its keys begin with "
                                  f"{', '.join(list(original.state)[:3])}")
        if kind in found:
            raise CheckpointError(f"{original.path}: a second {kind} beside {found[kind].path}; give one of each")
        found[kind] = original
    for kind in ("tokenizer", "transformer"):
        if kind not in found:
            raise CheckpointError(f"{_names(originals)}: no {kind} there; give the file of the tokenizer (vq_ds16_..., "
                                  "vae_..., kl16...) and that of the transformer")
    if ("student" in found) != (source == "dd1"):
        raise CheckpointError(f"{_names(originals)}: a student of Distilled Decoding and its teacher are converted "
                              "together, with the tokenizer and --from dd1")
    for kind, fits in _FAMILIES[_teacher(found["transformer"]) if source == "dd1" else source].items():
        if not fits(found[kind].state):
            others = [name for name, family in _FAMILIES.items() if family[kind](found[kind].state)]
            raise CheckpointError(f"{found[kind].path}: this {kind} is none for --from {source}; "
                                  f"it belongs to --from {' or '.join(others)}")
    return Files(found["tokenizer"], found["transformer"], found.get("encoder"), found.get("student"))


def _names(originals: Sequence[OriginalFile]) -> str:
    return ", ".join(original.path.name for original in originals) or "no files"


def _is_controlar(state: dict[str, Tensor]) -> bool:
    return "adapter_mlp.fc1.weight" in state


_KINDS: Recognisers = {         # the first that fits
    "student": is_student,
    "tokenizer": lambda state: is_vq(state) or is_var_vae(state) or is_kl(state),
    "transformer": lambda state: is_transformer(state) or is_var(state) or is_mar(state),
    "encoder": lambda state: any(key.endswith(_PATCHES) for key in state),
}
_LLAMAGEN: Recognisers = {"tokenizer": is_vq, "transformer": is_transformer}
_FAMILIES: dict[str, Recognisers] = {
    "llamagen": _LLAMAGEN, "controlar": _LLAMAGEN,
    "var": {"tokenizer": is_var_vae, "transformer": is_var},
    "mar": {"tokenizer": is_kl, "transformer": is_mar},
}


def _llamagen(files: Files, options: Options, notify: Notify) -> tuple[Components, PipelineSettings]:
    if files.controlled:
        raise CheckpointError(f"{files.transformer.path}: holds ControlAR weights; convert it with --from controlar")
    _refuse_encoder(files, "LlamaGen")
    tokenizer = _tokenizer(files.tokenizer)
    block_size = _block_size(files.transformer, tokenizer.stride, options, notify)
    state = transformer_from_llamagen(files.transformer.state)
    transformer = _transformer(files.transformer.path, state, options, block_size, points=0)
    settings = _settings(tokenizer, transformer, options, "LlamaGen", LLAMAGEN)
    text = transformer.config.conditioning == "text"
    return ({"tokenizer": tokenizer, "transformer": transformer},
            replace(settings, cfg=7.5 if text else 4.0, top_k=1000 if text else 2000))      # the demos' defaults


def _controlar(files: Files, options: Options, notify: Notify) -> tuple[Components, PipelineSettings]:
    tokenizer = _tokenizer(files.tokenizer)
    block_size = _block_size(files.transformer, tokenizer.stride, options, notify)
    control = (_released_control if files.controlled else _new_control)(files, tokenizer.stride, options, notify)
    state = transformer_from_llamagen(files.transformer.state)
    transformer = _transformer(files.transformer.path, state, options, block_size, control.config.points)
    settings = _settings(tokenizer, transformer, options, "ControlAR", CONTROLAR)
    return ({"tokenizer": tokenizer, "transformer": transformer, "control": control},
            replace(settings, control_types=options.control_types, cfg=4.0, top_k=2000))    # the demos' defaults


def _teacher(transformer: OriginalFile) -> str:
    """Whose file a student's teacher is."""
    return "var" if is_var(transformer.state) else "llamagen"


def _distilled(files: Files, options: Options, notify: Notify) -> tuple[Components, PipelineSettings]:
    """Tokenizer and teacher as in their own files, and the student beside them, for the decoder dd1."""
    teacher = _teacher(files.transformer)
    components, settings = CONVERTERS[teacher](files, options, notify)
    law: dict[str, Any] = {"cfg": 3.0, "top_k": 900, "top_p": 0.95} if teacher == "var" else {"cfg": 2.0, "top_k": 8000}
    source = f"{settings.source}; {DISTILLED.source}, {DISTILLED.paper}"
    return {**components, f"{SECOND}dd1": _student(files, components, notify)}, replace(settings, source=source, **law)


def _student(files: Files, components: Components, notify: Notify) -> ARStudent | VARStudent:
    assert files.student is not None
    path, state = files.student.path, files.student.state
    teacher, codebook = components["transformer"].config, components["tokenizer"].config
    passes = STUDENT_PASSES.get((teacher.layers, teacher.dim), {})
    if not passes:
        notify(f"{path.name}: of no published size, so it is taken to be trained for one pass; \"timesteps\" and "
               f"\"split\" in {SECOND}dd1/config.json say more")
    with torch.device("meta"):
        student: ARStudent | VARStudent
        if _teacher(files.transformer) == "var":
            student = VARStudent(VARStudentConfig(**infer_var_student_config(state, teacher.heads), **passes))
        else:
            sizes = infer_ar_student_config(state, teacher.heads)
            student = ARStudent(ARStudentConfig(**sizes, block_size=teacher.block_size, **passes))
    if (student.vocab_size, student.latent_dim) != (codebook.codebook_size, codebook.codebook_dim):
        raise CheckpointError(f"{path}: the student knows {student.vocab_size} codes of {student.latent_dim} channels, "
                              f"the tokenizer {codebook.codebook_size} of {codebook.codebook_dim}; give files of the "
                              "same model")
    load_state(student, student_from_dd(state), str(path))
    return student


def _var(files: Files, options: Options, notify: Notify) -> tuple[Components, PipelineSettings]:
    _refuse_encoder(files, "VAR")
    sizes = infer_var_config(files.transformer.state, options.transformer_heads(VAR_PRESETS))
    config = infer_multiscale_config(files.tokenizer.state, sizes["scales"])
    if (sizes["vocab_size"], sizes["codebook_dim"]) != (config.codebook_size, config.codebook_dim):
        raise CheckpointError(f"the transformer knows {sizes['vocab_size']} codes of {sizes['codebook_dim']} channels, "
                              f"the tokenizer {config.codebook_size} of {config.codebook_dim}; give files of the same "
                              "model")
    with torch.device("meta"):
        tokenizer, transformer = MultiscaleTokenizer(config), VARTransformer(VARConfig(**sizes))
    load_state(tokenizer, multiscale_from_var(files.tokenizer.state), str(files.tokenizer.path))
    load_state(transformer, transformer_from_var(files.transformer.state), str(files.transformer.path))
    side = config.scales[-1][0] * tokenizer.stride
    settings = _described(transformer.config, _own_side(side, options), options, "VAR", VAR)
    return ({"tokenizer": tokenizer, "transformer": transformer},
            replace(settings, decoder="scale", cfg=2.5, top_k=900, top_p=0.96))     # 1 + cfg of the release's README


def _mar(files: Files, options: Options, notify: Notify) -> tuple[Components, PipelineSettings]:
    _refuse_encoder(files, "MAR")
    codec = infer_kl_config(files.tokenizer.state)
    if codec != KLConfig():
        notify(f"{files.tokenizer.path.name}: not KL-16; its latents are scaled by {codec.scale} as those of KL-16, "
               "\"scale\" in tokenizer/config.json sets another")
    heads = options.transformer_heads(MAR_PRESETS)
    config = from_dict(MARConfig, infer_mar_config(files.transformer.state, codec.latent_channels, heads))
    with torch.device("meta"):
        tokenizer, transformer = KLTokenizer(replace(codec, patch_size=config.patch)), MARTransformer(config)
    load_state(tokenizer, kl_from_ldm(files.tokenizer.state), str(files.tokenizer.path))
    load_state(transformer, files.transformer.state, str(files.transformer.path))
    settings = _described(config, _own_side(config.grid * tokenizer.stride, options), options, "MAR", MAR)
    sizes = (config.encoder_layers, config.encoder_dim)
    cfg = next((preset.cfg for preset in MAR_PRESETS.values() if (preset.layers, preset.dim) == sizes), 3.0)
    return {"tokenizer": tokenizer, "transformer": transformer}, replace(settings, decoder="masked", cfg=cfg)


CONVERTERS: dict[str, Converter] = {
    "llamagen": _llamagen, "controlar": _controlar, "dd1": _distilled, "var": _var, "mar": _mar,
}


def _refuse_encoder(files: Files, title: str) -> None:
    if files.encoder is not None:
        raise CheckpointError(f"{files.encoder.path}: {title} has no control encoder; --from controlar adds one to "
                              "LlamaGen's models")


def _tokenizer(original: OriginalFile) -> VQTokenizer:
    config = infer_vq_config(original.state)
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    load_state(tokenizer, vq_from_llamagen(original.state), str(original.path))
    return tokenizer


def _transformer(path: Path, state: dict[str, Tensor], options: Options, block_size: int, points: int) -> ARTransformer:
    sizes = infer_ar_config(state, options.transformer_heads())
    places = injection_layers(sizes["layers"], points) if points else ()
    with torch.device("meta"):
        transformer = ARTransformer(ARConfig(**sizes, block_size=block_size, inject_layers=places))
    load_state(transformer, state, str(path))
    return transformer


def _released_control(files: Files, stride: int, options: Options, notify: Notify) -> ControlAdapter:
    path, state = files.transformer.path, files.transformer.state
    if files.encoder is not None:
        raise CheckpointError(f"{files.encoder.path}: {path.name} brings its own trained encoder; leave this file out")
    parts = split_controlar(state)
    if parts.dropped:
        notify(f"{path.name}: left out {', '.join(parts.dropped)}: without effect in the original")
    config = control_config_from_controlar(state, _encoder_config(options), options.control_types, stride)
    with torch.device("meta"):
        control = ControlAdapter(config)
    load_state(control, parts.control, str(path))
    return control


def _new_control(files: Files, stride: int, options: Options, notify: Notify) -> ControlAdapter:
    """A control path to train: a pretrained encoder and a fusion that adds zero."""
    if files.encoder is None:
        raise CheckpointError(f"{files.transformer.path}: holds no ControlAR weights; convert it with --from llamagen, "
                              "or add the file of a ViT or DINOv2 encoder to start training a control from")
    mapped = encoder_state(files.encoder.state)
    if mapped.dropped:
        notify(f"{files.encoder.path.name}: left out {', '.join(mapped.dropped)}: not part of the control encoder")
    sizes = encoder_sizes(mapped.state, _encoder_config(options))
    dim = files.transformer.state["tok_embeddings.weight"].shape[1]
    config = ControlConfig(**sizes, stride=stride, types=options.control_types, dim=dim, points=_POINTS)
    control = ControlAdapter(config)
    control.load_encoder(mapped.state)
    notify("the control path is new: it changes nothing before it is trained")
    return control


def _text_parts(config: ARConfig, options: Options, notify: Notify) -> Components:
    """The T5 encoder and tokenizer of a text-conditional model, if they are given."""
    if options.text_encoder is None:
        if config.conditioning == "text":
            notify("without --text-encoder FOLDER (FLAN-T5-XL for the published models) the pipeline takes no prompts, "
                   "only prompt_embeds")
        return {}
    if config.conditioning != "text":
        raise InputError(f"--text-encoder {options.text_encoder}: this model takes classes, not captions; leave it out")
    text = TextEncoder.from_folder(options.text_encoder, options.text_encoder, options.dtype or torch.float32,
                                   torch.device("cpu"))
    if text.model.config.d_model != config.caption_dim:
        raise CheckpointError(f"{options.text_encoder}: gives features of width {text.model.config.d_model}, the model "
                              f"reads {config.caption_dim}; the published models read FLAN-T5-XL")
    return {"text_encoder": text.model, "text_tokenizer": text.tokenizer}


def _encoder_config(options: Options) -> dict[str, Any] | None:
    return None if options.encoder_heads is None else {"num_attention_heads": options.encoder_heads}


def _block_size(original: OriginalFile, stride: int, options: Options, notify: Notify) -> int:
    """Cells of the square rotary table: as ControlAR's file says, as asked for, as published, or of 256 pixels."""
    if _BLOCK in original.state:
        return original.state[_BLOCK].shape[0]
    if options.image_size is not None:
        if options.image_size < stride or options.image_size % stride:
            nearest = max(stride, round(options.image_size / stride) * stride)
            raise InputError(f"--image-size {options.image_size}: must be a multiple of {stride}; "
                             f"the nearest is {nearest}")
        return (options.image_size // stride) ** 2
    for published in PUBLISHED:
        if published.file == original.path.name:
            return published.block_size
    notify(f"{original.path.name}: does not tell the size of its images; taken to be {DEFAULT_IMAGE_SIZE} pixels, "
           "--image-size sets another")
    return (DEFAULT_IMAGE_SIZE // stride) ** 2


def _settings(tokenizer: VQTokenizer, transformer: ARTransformer, options: Options, title: str,
              family: Family) -> PipelineSettings:
    """Settings of LlamaGen's models. Raises CheckpointError or InputError on parts that do not fit together."""
    config, side = transformer.config, math.isqrt(transformer.config.block_size) * tokenizer.stride
    if config.vocab_size != tokenizer.vocab_size:
        raise CheckpointError(f"the transformer knows {config.vocab_size} codes, the tokenizer {tokenizer.vocab_size}; "
                              "give files of the same model")
    size = options.image_size or side
    if size > side:
        raise InputError(f"--image-size {size}: the rotary table of this file ends at {side}; give {side} or less")
    return _described(config, size, options, f"{title}, {config.conditioning}-conditional", family)


def _own_side(side: int, options: Options) -> int:
    """Pixels per side of a model that knows one size. Raises InputError when another is asked for."""
    if options.image_size not in (None, side):
        raise InputError(f"--image-size {options.image_size}: this model paints {side}x{side}; leave it out")
    return side


def _described(config: Any, side: int, options: Options, title: str, family: Family) -> PipelineSettings:
    """Settings that all families share. Raises InputError on class names that do not fit."""
    classes = config.num_classes if config.conditioning == "class" else 0
    if options.class_names and len(options.class_names) != classes:
        raise InputError(f"{len(options.class_names)} class names for {classes} classes; give one name for each")
    return PipelineSettings(title=title, source=f"{family.source}, {family.paper}", licence=family.licence,
                            class_names=options.class_names, size=(side, side))
