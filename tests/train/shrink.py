"""Recipes at toy size: the widths, depths, batches, picture sizes and lengths of a YAML file are made small, and its
data, tokenizer and text encoder are toys; all else stays as it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from arimg.accel.flow import FlowSolver
from arimg.checkpoints import save_component
from arimg.config import from_dict, read_values
from arimg.control.base import AsIs, get_type
from arimg.models.generators import ARGenerator, VARGenerator
from arimg.registry import CONTROLS, OBJECTIVES
from arimg.tokenizers.kl import KLConfig, KLTokenizer
from arimg.tokenizers.multiscale import MultiscaleConfig, MultiscaleTokenizer
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from arimg.train.jobs import CodesJob, MapsJob, Part
from arimg.train.pairs import PairMaker, PairsConfig, make_pairs
from tests.toy import toy_pipeline, toy_text_encoder
from tests.toy_scales import toy_scales_pipeline
from tests.train.toy_emoji import write_toy_emoji
from tests.train.toy_sources import write_shards

CODES, TEXT, SIDE = 16, 12, 4       # codebook, width of captions, tokens per side
DIM, LAYERS = 32, 3
SCALES = [[1, 1], [2, 2], [4, 4]]
STRIDES = {"emoji": 8, "shards": 16, "folder": 16}
EMOJI_SIZE = SIDE * STRIDES["emoji"]


def write_toys(root: Path) -> Path:
    """$ARIMG_HOME of toy recipes: data, tokenizers, a text encoder."""
    write_toy_emoji(root / "data" / "emoji-128", size=EMOJI_SIZE)
    write_shards(root / "shards", shards=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for stride in set(STRIDES.values()):
            config = VQConfig(codebook_size=CODES, codebook_dim=8, base_channels=32, multipliers=(1, 1), res_blocks=1,
                              z_channels=8, patch_size=stride // 2)
            save_component(VQTokenizer(config), root / f"vq-{stride}")
        scales = tuple((height, width) for height, width in SCALES)
        network: nn.Module = MultiscaleTokenizer(MultiscaleConfig(
            codebook_size=CODES, codebook_dim=8, base_channels=32, multipliers=(1,) * 5, res_blocks=1, scales=scales,
            phis=2))
        save_component(network, root / "multiscale-16")
        save_component(KLTokenizer(KLConfig(base_channels=32, multipliers=(1,) * 5, res_blocks=1, latent_channels=2)),
                       root / "kl-16")
    write_toy_emoji(root / "data" / "emoji-16", size=16)
    _write_teachers(root)
    text = toy_text_encoder(TEXT)
    text.model.save_pretrained(root / "t5")
    text.tokenizer.save_pretrained(root / "t5")
    return root


def shrink(path: Path, root: Path) -> Any:
    """The run of a recipe at toy size, in float32 and one process. As it stands it must parse, too, with toy paths."""
    values = read_values(path)
    if values["objective"].startswith("dd"):
        return _shrink_student(values, path, root)
    data, model = values.setdefault("data", {}), values.setdefault("model", {})
    source = data.get("source", "emoji")
    values |= {"name": f"toy-{path.stem}", "init_from": ""}
    for name in ("new_layers", "new_control_layers"):       # of what it starts from
        values.pop(name, None)
    if source != "emoji":
        data |= {"source": "shards", "folder": str(root / "shards"), "validation": ""}
    _fill_paths(values, root, STRIDES[source])
    config_class = OBJECTIVES.load(values["objective"]).config_class
    from_dict(config_class, values)
    data["batch_size"] = 2
    values["optim"] |= {"steps": 1, "warmup_steps": 0}
    values.setdefault("train", {}).update(compile=False, sharding="none", precision="no", threads=1)
    _shrink_pictures(data, source)
    if values["objective"] == "tokenizer":
        _shrink_tokenizer(values, root)
    elif "latent_channels" in model:
        _shrink_continuous(model, source)
    else:
        _shrink_model(model, source)
        _shrink_control(values)
    if values.get("maps") == "cached":
        data["cache"] = str(root / "caches" / path.stem)
    return from_dict(config_class, values)


def _shrink_student(values: dict[str, Any], path: Path, root: Path) -> Any:
    """Of a teacher of the recipe's kind, whose pairs and tuned network write_toys makes."""
    kind = "scales" if "-var-" in path.stem else "raster"
    values |= {"name": f"toy-{path.stem}", "teacher": str(root / f"teacher-{kind}")}
    if values["objective"] != "dd1":
        values["init_from"] = str(root / f"tuned-{kind}")
    config_class = OBJECTIVES.load(values["objective"]).config_class
    values["data"]["folder"] = str(root / f"pairs-{kind}")
    from_dict(config_class, values)
    values["data"] |= {"batch_size": 2, "held_out": 2}
    values["optim"] |= {"steps": 1, "warmup_steps": 0}
    values["train"] |= {"precision": "no", "threads": 1, "accumulation": 1}
    if "timesteps" in values:
        values |= {"timesteps": [0, 2], "split": values["split"] and 2, "perceptual": 0.0}
    if "head_width" in values:
        values |= {"head_width": 16, "head_depth": 1, "fit_steps": 2, "head_only": False}
    if "turns" in values:
        values["turns"] = {"updates": 1}                # the one step trains both networks
    return from_dict(config_class, values)


def _write_teachers(root: Path) -> None:
    """Pipelines of both orders, pairs that they made, and networks whose heads are no longer zero."""
    for kind, pipe in (("raster", toy_pipeline()), ("scales", toy_scales_pipeline())):
        pipe.save_pretrained(root / f"teacher-{kind}")
        config = PairsConfig(8, data=str(root / "data" / "emoji-16"), solver=FlowSolver(4), batch=4)
        make_pairs(PairMaker(pipe, config), root / f"pairs-{kind}")
        channels = pipe.tokenizer.config.codebook_dim
        network = ARGenerator.from_teacher(pipe.transformer, channels, 16, 1) if kind == "raster" else \
            VARGenerator.from_teacher(pipe.transformer, 16, 1)
        for parameter in network.head.parameters():
            nn.init.normal_(parameter, std=0.1)
        save_component(network, root / f"tuned-{kind}")


def _fill_paths(values: dict[str, Any], root: Path, stride: int) -> None:
    """What a recipe leaves to its user."""
    if "scales" in values["model"]:
        values["tokenizer"] = str(root / "multiscale-16")
    elif "latent_channels" in values["model"]:
        values["tokenizer"] = str(root / "kl-16")
    elif values["objective"] != "tokenizer":
        values["tokenizer"] = str(root / f"vq-{stride}")
    if values["model"].get("conditioning") == "text":
        values["text_encoder"] = str(root / "t5")


def _shrink_pictures(data: dict[str, Any], source: str) -> None:
    side = SIDE * STRIDES[source]
    if "crop" in data:
        data["crop"]["size"] = side
    if "buckets" in data:
        data["buckets"] |= {"min_side": side // 2, "max_side": side, "max_tokens": SIDE * SIDE // 2}
    data["workers"] = 2


def _shrink_tokenizer(values: dict[str, Any], root: Path) -> None:
    model, values["data"]["crop"]["size"] = values["model"], EMOJI_SIZE
    model |= {"codebook_size": CODES, "base_channels": 32, "z_channels": 8, "res_blocks": 1}
    if values["loss"].get("perceptual"):
        values["loss"]["perceptual"] = 0.0          # its weights do not ship with the package
    values["loss"]["start_step"] = 0                # the one step has an adversary, if the recipe has


def _shrink_model(model: dict[str, Any], source: str) -> None:
    model |= {"vocab_size": CODES, "dim": DIM, "layers": LAYERS, "heads": 2, "num_classes": 2 + (source != "emoji")}
    if "scales" in model:
        model |= {"scales": SCALES, "codebook_dim": 8}
    else:
        model["ffn_hidden"] = 48
    if model.get("conditioning") == "text":
        model |= {"caption_dim": TEXT, "caption_length": 6}
    if "inject_layers" in model:
        model["inject_layers"] = [0, 1, 2]


def _shrink_continuous(model: dict[str, Any], source: str) -> None:
    model |= {"latent_channels": 2, "grid": SIDE, "num_classes": 2 + (source != "emoji")}
    for part in ("encoder_", "decoder_") if "encoder_dim" in model else ("",):
        model |= {f"{part}dim": DIM, f"{part}layers": LAYERS, f"{part}heads": 2}
    if "ffn_hidden" in model:
        model["ffn_hidden"] = 48
    model["head"] |= {"layers": 1, "width": 16, "steps": "ddim10"}


def _shrink_control(values: dict[str, Any]) -> None:
    if "control" in values:
        values["control"] |= {"embed_dim": 16, "depth": 1, "heads": 2, "ffn_hidden": 32, "dim": DIM}


def fake_extractors(setitem: Any) -> None:
    """Extractors whose weights do not ship with the package: the picture itself stands in for its map."""
    for name in ("hed", "lineart", "depth", "seg"):
        kind = get_type(name)
        globals()[f"_Fake_{name}"] = type(f"_Fake_{name}", (AsIs,), {"type": kind})
        setitem(CONTROLS.entries, name, f"{__name__}:_Fake_{name}")


def fill_caches(config: Any) -> None:
    """Make what a recipe wants to find ready."""
    if getattr(config, "maps", "") == "cached":
        CodesJob(config).run(Part())
        for name in config.control.types:
            MapsJob(config, name).run(Part())
