"""Objective `ar`: the class- or text-conditional AR transformer on codes (LlamaGen section 2.2), from any source.

Objective `control` adds an adapter and maps to it (train/control.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, Guidance
from arimg.accel.target import Target
from arimg.checkpoints import PipelineSettings, load_component, load_state, save_pipeline
from arimg.errors import ConfigError
from arimg.images import make_grid, to_pil
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.registry import DECODERS
from arimg.train.captions import CachedCaptions, Captions, LiveCaptions, captions_cache, load_encoder
from arimg.train.codes import Codes, open_codes
from arimg.train.crops import Crop, bucket_sizes
from arimg.train.data import CodeSource, Example, Feed, Loader, MapSource, batch_rng, processes
from arimg.train.objective import SingleNetwork
from arimg.train.run import RunConfig
from arimg.train.sources import EmojiSource, Source, Split, open_splits

SHOWN = 8           # pictures in a sample grid
VALIDATED = 64      # held-out pictures that the validation loss is a mean of
NEAR = 64           # codes that may stand in for a code


@dataclass(frozen=True)
class ARRun(RunConfig):
    """A run of the transformer on codes."""

    tokenizer: str = ""                     # tokenizer component folder
    text_encoder: str = ""                  # text-conditional: folder of a T5 encoder and its tokenizer
    short_captions: float = 0.0             # share of samples described by the first sentence of their caption
    flip: bool = True                       # mirror images as well
    token_noise: float = 0.0                # largest share of a sample's codes that are read as a near code instead
    model: ARConfig = field(default_factory=ARConfig)
    settings: PipelineSettings = field(default_factory=PipelineSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokenizer:
            raise ConfigError("tokenizer: is empty; give the folder that the tokenizer run exported, tokenizer=FOLDER")
        check_shares(token_noise=self.token_noise, short_captions=self.short_captions)
        check_shares(**{"model.class_dropout": self.model.class_dropout})
        DECODERS.check(self.settings.decoder)


def check_shares(**shares: float) -> None:
    """Raises ConfigError for a number that is not in [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name}={share}: is a share of the samples or codes; write a number from 0 to 1")


class ARTask(nn.Module):
    """Cross entropy of one batch in nats per token."""

    def __init__(self, config: ARRun, codebook_VC: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = self.new_transformer(config, codebook_VC)
        self.grid = grid

    def new_transformer(self, config: ARRun, codebook_VC: Tensor) -> Any:
        """The network of the config, fresh."""
        transformer = ARTransformer(config.model)
        if config.model.codebook_dim is not None:
            transformer.set_codebook(codebook_VC)
        return transformer

    def forward(self, codes_BL: Tensor, read_BL: Tensor, conditions: Tensor, drop_B: Tensor,
                *control: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and figures: codes_BL are predicted from the codes read_BL before them. Dropped conditions become
        the null one; `control` is what `inject` takes."""
        condition = self.transformer.drop(as_condition(conditions), drop_B)
        logits_BLV = self.transformer(read_BL, condition, self.grid_of(*control), self.inject(*control))
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), codes_BL.flatten()), {}

    def grid_of(self, *control: Tensor) -> tuple[int, int]:
        """(h, w) tokens of this batch: here always the same."""
        return self.grid

    def inject(self, *control: Tensor) -> Tensor | None:
        """inject_KBLD: none here."""
        return None


def as_condition(conditions: Tensor) -> Condition:
    """Class ids (B,), or caption features (B, P, C) whose padding slots are exactly zero."""
    if conditions.ndim == 1:
        return Condition(class_ids_B=conditions)
    return Condition(caption_BPC=conditions, caption_mask_BP=(conditions != 0).any(dim=2))


class ARObjective(SingleNetwork):
    """Train on any source (train/sources.py)."""

    config_class: type[ARRun] = ARRun
    task_class: type[ARTask] = ARTask
    decoder_class: Callable[[], Decoder] = PlainAR

    def __init__(self, config: Any) -> None:
        self.config = config
        self.text = getattr(config.model, "conditioning", "class") == "text"
        train, held_out = open_splits(config.data)
        self.source = train.source
        tokenizer = load_component(config.tokenizer, torch.float32)
        self.sizes = self._sizes(tokenizer.stride)
        self.feed = self._feed(train, tokenizer)
        loader = Loader(config.data, held_out, config.seed)
        same = held_out.source is train.source
        self.held_out = replace(self.feed if same else self._feed(held_out, tokenizer), loader=loader)
        self._check_tokenizer(tokenizer)
        self._check_classes()
        torch.manual_seed(config.seed)
        self.network = self.new_task(tokenizer)
        self.near_VK = nearest_codes(tokenizer.space().codebook_VC, NEAR) if config.token_noise else None
        self._load_weights()

    @property
    def cache(self) -> Codes:
        """Codes of the training samples, and the tokenizer."""
        codes: Any = self.feed.codes
        return codes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures, of the held-out ones where there are several sizes."""
        if isinstance(self.source, EmojiSource):
            shape = self.source.emoji.images.shape
            return int(shape[1]), int(shape[2])
        return self.config.data.crop.size, self.config.data.crop.size

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) tokens at `size`."""
        stride = self.cache.tokenizer.stride
        return self.size[0] // stride, self.size[1] // stride

    def _sizes(self, stride: int) -> list[tuple[int, int]]:
        """Those that a micro-batch may have."""
        data = self.config.data
        if isinstance(self.source, EmojiSource) and (data.crop.kind != "center" or data.crop.size):
            raise ConfigError(f"data.crop: kind={data.crop.kind}, size={data.crop.size}; the codes of emoji are of "
                              "whole pictures: leave data.crop out")
        if data.buckets is None:
            return [self.size]
        if self.task_class.grid_of is ARTask.grid_of:
            raise ConfigError("data.buckets: a model learns the size of a picture from its control map alone; use "
                              "objective: control")
        if not Crop(data.crop, True).endless:
            raise ConfigError(f"data.crop.kind={data.crop.kind}: makes squares; with data.buckets write random")
        return bucket_sizes(data.buckets, stride)

    def _feed(self, split: Split, tokenizer: Any) -> Feed:
        """What is read of a split."""
        config, source = self.config, split.source
        crop = Crop(config.data.crop, config.flip)
        return Feed(Loader(config.data, split, config.seed, processes() * config.train.accumulation), crop,
                    self.open_codes(source, crop, tokenizer), self._captions(source), self.maps(source, crop))

    def open_codes(self, source: Source, crop: Crop, tokenizer: Any) -> CodeSource:
        """Where the codes of a source come from."""
        return open_codes(self.config.data, crop, source, tokenizer)

    def new_task(self, tokenizer: Any) -> ARTask:
        """The network that is trained."""
        return self.task_class(self.config, tokenizer.space().codebook_VC, self.grid)

    def _captions(self, source: Source) -> Captions | None:
        if not self.text:
            return None
        config, model = self.config, self.config.model
        if config.data.cache and not config.text_encoder:
            cache = captions_cache(config.data, source, model.caption_length, model.caption_dim)
            return CachedCaptions(cache, model.caption_length, model.caption_dim, config.short_captions)
        return LiveCaptions(source, load_encoder(config.text_encoder), model.caption_length, config.short_captions)

    def maps(self, source: Source, crop: Crop) -> MapSource | None:
        """Where control maps come from: there are none here."""
        return None

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """Raises ConfigError where the model and the tokenizer do not fit."""
        if self.config.model.vocab_size != tokenizer.vocab_size:
            raise ConfigError(f"model.vocab_size={self.config.model.vocab_size}: the tokenizer {self.config.tokenizer} "
                              f"has {tokenizer.vocab_size} codes; write vocab_size: {tokenizer.vocab_size}")

    def _check_classes(self) -> None:
        model, names = self.config.model, self.source.class_names
        if self.text:
            return
        if names and model.num_classes != len(names):
            raise ConfigError(f"model.num_classes={model.num_classes}: the data set {self.config.data.path()} has "
                              f"{len(names)}; write num_classes: {len(names)}")
        labels = self.source.labels()
        if labels.min() < 0 or labels.max() >= model.num_classes:
            raise ConfigError(f"model.num_classes={model.num_classes}: the classes of {self.config.data.path()} are "
                              f"{labels.min()} to {labels.max()} (-1: none); make them fit")

    def _load_weights(self) -> None:
        """Those of the pipeline folder `init_from`; a control that it lacks, as those of `ar` runs do, stays random."""
        folder = Path(self.config.init_from)
        for name, module in self.network.named_children() if self.config.init_from else ():
            if name == "transformer" or (folder / name).is_dir():
                load_state(module, self.initial_state(name, folder / name), str(folder / name))

    def initial_state(self, name: str, folder: Path) -> dict[str, Tensor]:
        """Weights of the component folder that the part `name` of the network starts from: float32, whatever the file
        holds, because small updates of 16-bit weights are rounded away."""
        return dict(load_component(folder, torch.float32).state_dict())

    def batch(self, step: int, micro: int = 0) -> tuple[Tensor, ...]:
        """(codes, what is read of them, conditions, drop condition, ...) of training samples."""
        rng = batch_rng(self.config.seed, step, micro)
        examples = self.feed.batch(step, micro, self.sizes[int(rng.integers(len(self.sizes)))])
        drop_B = torch.from_numpy(rng.random(len(examples)) < self.config.model.class_dropout)
        codes_BL = self.cache.of(examples)
        read_BL = self.read(self.perturbed(codes_BL, rng))
        return codes_BL, read_BL, self.conditions(examples, self.feed), drop_B, *self.control(examples, drop_B, rng)

    def perturbed(self, codes_BL: Tensor, rng: np.random.Generator) -> Tensor:
        """Codes with a share of them, drawn per sample from [0, token_noise), replaced by near ones: the model learns
        to read its own small errors (as bitwise self-correction does, Han et al. 2024, arXiv:2412.04431)."""
        if self.near_VK is None:
            return codes_BL
        shape = tuple(codes_BL.shape)
        replaced_BL = rng.random(shape) < rng.uniform(0, self.config.token_noise, (shape[0], 1))
        near_BL = self.near_VK[codes_BL.numpy(), rng.integers(0, self.near_VK.shape[1], shape)]
        return torch.where(torch.from_numpy(replaced_BL), torch.from_numpy(near_BL), codes_BL)

    def read(self, codes_BL: Tensor) -> Tensor:
        """What the network reads of these codes: the codes themselves."""
        return codes_BL

    def conditions(self, examples: Sequence[Example], feed: Feed) -> Tensor:
        """class_ids_B, int64, or caption_BPC."""
        if self.text:
            captions: Any = feed.captions
            features_BPC: Tensor = captions.features([example.caption for example in examples])
            return features_BPC
        labels = feed.loader.split.source.labels()
        return torch.tensor([int(labels[example.index]) for example in examples])

    def control(self, examples: Sequence[Example], drop_B: Tensor, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """What the task's `inject` takes, for training."""
        return ()

    def held_out_control(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """The same for held-out pictures: nothing dropped."""
        return ()

    @cached_property
    def held_out_batch(self) -> tuple[Tensor, ...]:
        """As `batch`, of held-out samples with nothing dropped: the same every time."""
        examples = self.held_out.held_out(VALIDATED, self.size)
        codes: Any = self.held_out.codes
        codes_BL, kept_B = codes.of(examples), torch.zeros(len(examples), dtype=torch.bool)
        return (codes_BL, self.read(codes_BL), self.conditions(examples, self.held_out), kept_B,
                *self.held_out_control(examples))

    @torch.no_grad()
    def validation_loss(self, network: ARTask) -> float:
        """Nats per token on held-out pictures with condition and control."""
        network.eval()
        device = next(network.parameters()).device
        return float(network(*(tensor.to(device) for tensor in self.held_out_batch))[0])

    @torch.no_grad()
    def sample(self, network: ARTask) -> Image.Image:
        """Held-out maps (if any), reconstructions, samples of their conditions; says the validation loss."""
        network.eval()
        device = next(network.parameters()).device
        codes_BL, _, conditions, _, *control = (tensor[:SHOWN].to(device) for tensor in self.held_out_batch)
        tokenizer = self.cache.tokenizer
        request = DecodeRequest(as_condition(conditions), self.grid, torch.arange(len(codes_BL), device=device),
                                network.inject(*control), Guidance(self.config.settings.cfg), space=tokenizer.space())
        result = self.decoder_class().decode(Target(network.transformer, request), request)
        assert result.codes_BL is not None
        place = next(tokenizer.parameters()).device
        rows = [tokenizer.decode_codes(codes.to(place), self.grid).cpu() for codes in (codes_BL, result.codes_BL)]
        print(f"validation loss {self.validation_loss(network):.3f} nats per token", file=sys.stderr)
        pictures = torch.cat([*(map_B3HW.cpu() for map_B3HW in control[:1]), *rows])
        return make_grid([to_pil(picture) for picture in pictures], columns=len(codes_BL))

    def export(self, network: ARTask, folder: Path) -> None:
        """The whole pipeline: tokenizer and what was trained."""
        settings = replace(self.config.settings, class_names=() if self.text else self.source.class_names,
                           size=self.size, control_types=self.control_types())
        save_pipeline(folder, {"tokenizer": self.cache.tokenizer, **dict(network.named_children())}, settings)

    def control_types(self) -> tuple[str, ...]:
        """What the pipeline's users may give: none here."""
        return ()


def nearest_codes(codebook_VC: Tensor, count: int) -> np.ndarray:
    """int64 (V, K): the K nearest other codes of each code, K = count or as many as there are."""
    distances_VV = torch.cdist(codebook_VC.float(), codebook_VC.float()).fill_diagonal_(float("inf"))
    return distances_VV.topk(min(count, len(codebook_VC) - 1), largest=False).indices.numpy()
