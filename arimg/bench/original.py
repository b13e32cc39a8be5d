"""LlamaGen as its authors wrote it, from a checkout that the user has: its networks, its optimiser and its loop beside
ours with the same weights. None of its files is changed, and none is needed to use arimg."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.accel.ar import PlainAR
from arimg.accel.base import DecodeRequest, Guidance
from arimg.accel.target import Target
from arimg.checkpoints import load_state
from arimg.errors import InputError
from arimg.inference import lay_out, painting
from arimg.interop.llamagen import ar_config_from_llamagen, transformer_from_llamagen
from arimg.interop.vq import vq_from_llamagen
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.threads import cpu_threads, decode_threads
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from arimg.train.optim import build_optimizer
from arimg.train.run import OptimConfig

_PACKAGES = ("autoregressive", "tokenizer", "utils")        # the checkout's, without __init__.py
RECIPE = OptimConfig(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.05, clip_norm=1.0)      # its train_c2i.py


@dataclass(frozen=True)
class LlamaGen:
    """The modules of a checkout."""

    gpt: ModuleType
    generate: ModuleType
    vq: ModuleType


def load_llamagen(folder: str | Path) -> LlamaGen:
    """Import what is needed from a checkout of github.com/FoundationVision/LlamaGen. Raises InputError."""
    root = Path(folder).expanduser()
    names = ("autoregressive.models.gpt", "autoregressive.models.generate", "tokenizer.tokenizer_image.vq_model")
    missing = [path for path in (f"{name.replace('.', '/')}.py" for name in names) if not (root / path).is_file()]
    if missing:
        raise InputError(f"--llamagen {folder}: has no {missing[0]}; give a checkout of "
                         "github.com/FoundationVision/LlamaGen")
    with _importable(root):
        return LlamaGen(*map(import_module, names))


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """The checkout's folders as top-level packages, for as long as the block lasts."""
    for name in _PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(root / name)]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
            del sys.modules[name]


@dataclass(frozen=True)
class ARPair:
    """The original's class-conditional transformer and ours, with the same weights."""

    original: LlamaGen
    theirs: nn.Module
    ours: ARTransformer

    @property
    def config(self) -> ARConfig:
        """Ours."""
        return self.ours.config

    def train(self) -> None:
        """Ready for `their_loss` and `our_loss`."""
        self.theirs.train()
        self.ours.train()

    def eval(self) -> None:
        """Ready for decoding: ours laid out as a pipeline does it."""
        self.theirs.eval()
        lay_out(self.ours.eval())

    def their_loss(self, codes_BL: Tensor, class_ids_B: Tensor) -> Tensor:
        """Of the original's training step."""
        loss: Tensor = self.theirs(cond_idx=class_ids_B, idx=codes_BL[:, :-1], targets=codes_BL)[1]
        return loss

    def our_loss(self, codes_BL: Tensor, class_ids_B: Tensor) -> Tensor:
        """Of ours (train/ar.py), classes dropped at the same rate."""
        rate = self.config.class_dropout if self.ours.training else 0.0
        dropped_B = torch.linspace(0, 1, len(class_ids_B) + 1)[1:] <= rate
        condition = self.ours.drop(Condition(class_ids_B=class_ids_B), dropped_B)
        side = int(self.config.block_size ** 0.5)
        logits_BLV = self.ours(codes_BL, condition, (side, side))
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), codes_BL.flatten())

    def their_optimizer(self) -> torch.optim.Optimizer:
        """AdamW as its train_c2i.py builds it: fused, matrices decay."""
        weights = list(self.theirs.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [one for one in weights if one.ndim >= 2], "weight_decay": RECIPE.weight_decay},
            {"params": [one for one in weights if one.ndim < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=RECIPE.lr, betas=(RECIPE.beta1, RECIPE.beta2), fused=True)

    def our_optimizer(self) -> torch.optim.Optimizer:
        """As a run of ours builds it."""
        return build_optimizer(self.ours, RECIPE)

    def their_codes(self, class_id: int, tokens: int, cfg: float) -> Tensor:
        """codes_1L by the original's generate loop; no top-k, no top-p, temperature 1."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)      # it chooses its attention by a name of torch 2.0
            codes_1L: Tensor = self.original.generate.generate(
                self.theirs, torch.tensor([class_id]), tokens, cfg_scale=cfg, cfg_interval=-1, temperature=1.0, top_k=0,
                top_p=1.0, sample_logits=True)
        return codes_1L

    def our_codes(self, class_id: int, tokens: int, cfg: float) -> Tensor:
        """The same by plain decoding; `tokens` are whole rows of the grid."""
        width = int(self.config.block_size ** 0.5)
        assert tokens % width == 0, (tokens, width)
        request = DecodeRequest(Condition(class_ids_B=torch.tensor([class_id])), (tokens // width, width),
                                torch.tensor([0]), guidance=Guidance(cfg))
        with cpu_threads(decode_threads(self.ours, positions=2)):
            codes_BL = PlainAR().decode(Target(self.ours, request), request).codes_BL
        assert codes_BL is not None
        return codes_BL


def ar_pair(original: LlamaGen, dtype: torch.dtype = torch.float32, our_dtype: torch.dtype | None = None,
            **sizes: Any) -> ARPair:
    """Random weights, the same in both, up to rounding. `sizes` are arguments of the original's ModelArgs."""
    arguments = original.gpt.ModelArgs(**{"block_size": 256, "vocab_size": 16384, **sizes})
    theirs = original.gpt.Transformer(arguments)
    known = {key: value for key, value in asdict(arguments).items() if key not in ("cls_token_num",)}
    ours = ARTransformer(ARConfig(**ar_config_from_llamagen(known)))
    _fill(theirs)
    load_state(ours, transformer_from_llamagen(theirs.state_dict()), "the original's weights")
    for weight in ours.parameters():
        weight.data = weight.data.clone()
    return ARPair(original, theirs.to(dtype), ours.to(our_dtype or dtype))


@dataclass(frozen=True)
class VQPair:
    """The original's tokenizer and ours, with the same weights. `dtype` is what a pipeline of ours was asked for."""

    theirs: nn.Module
    ours: VQTokenizer
    dtype: torch.dtype = torch.float32

    def their_pixels(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3HW."""
        shape = [len(codes_BL), self.ours.config.codebook_dim, *grid]
        images_B3HW: Tensor = self.theirs.decode_code(codes_BL, shape)      # type: ignore[operator]
        return images_B3HW

    def our_pixels(self, codes_BL: Tensor, grid: tuple[int, int]) -> Tensor:
        """images_B3HW."""
        with painting(codes_BL.device, self.dtype):
            return self.ours.decode_codes(codes_BL, grid)


def vq_pair(original: LlamaGen, config: VQConfig, dtype: torch.dtype = torch.float32) -> VQPair:
    """Random weights, the same in both, in eval mode."""
    theirs = original.vq.VQModel(original.vq.ModelArgs(
        codebook_size=config.codebook_size, codebook_embed_dim=config.codebook_dim, z_channels=config.z_channels,
        encoder_ch_mult=list(config.multipliers), decoder_ch_mult=list(config.multipliers)))
    ours = VQTokenizer(config)
    load_state(ours, vq_from_llamagen(theirs.state_dict()), "the original's weights")
    lay_out(ours.eval().decoder)
    return VQPair(theirs.eval(), ours, dtype)


def _fill(network: nn.Module) -> None:
    """Random weights where the original begins with zeros, so that codes differ."""
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.02, generator=generator)
