"""The next-scale transformer of VAR (Tian et al. 2024, arXiv:2404.02905), with ControlAR's injection points. State-dict
keys are the release's.

Letters as in models/base.py; S scales; H heads; E channels per head; P = h_1 * w_1 slots of the first scale. Slot j
predicts token j, the tokens of all scales in one row. The slots of the first scale read the class; those of scale k+1
read, cell by cell, the map of everything up to scale k (TokenSpace.next_input). Slots of one scale do not see the
tokens drawn at one another, only the maps they read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arimg.config import check_sizes
from arimg.errors import ConfigError, InputError
from arimg.models.base import Backbone, Condition
from arimg.models.layers import Cache, SequenceCache, Window, at_least_float32, attention

MAX_ATTENTION_SCALE = 100.0
PLAIN_ATTENTION_SCALE = 0.25        # without l2 attention, besides E ** -0.5
RELEASED_SCALES = tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))     # 256 x 256 pixels


@dataclass(frozen=True)
class VARConfig:
    """Shape and conventions of one model. Raises ConfigError on values that do not fit together."""

    vocab_size: int = 4096
    codebook_dim: int = 32                                          # C, channels of the maps that the model reads
    scales: tuple[tuple[int, int], ...] = RELEASED_SCALES           # (h, w) in tokens, coarse to fine
    dim: int = 1024
    layers: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout: float = 0.1              # rate of dropped conditions in training; the null row exists anyway
    drop_path: float = 0.1 * 16 / 24        # stochastic depth of the last block, rising linearly from 0 at the first
    shared_adaln: bool = False              # one modulation for the whole net and a table per block (d36)
    l2_attention: bool = True               # normalised queries and keys, learnt temperature per head
    norm_eps: float = 1e-6
    gamma_init: float = 1e-3                # size of a new model's residual gates: 1e-3 (d16) to 5e-6 (d36)
    inject_layers: tuple[int, ...] = ()     # injection k is added before block inject_layers[k]

    conditioning: ClassVar[str] = "class"

    def __post_init__(self) -> None:
        check_sizes(self)
        object.__setattr__(self, "inject_layers", tuple(self.inject_layers))
        object.__setattr__(self, "scales", tuple((height, width) for height, width in self.scales))
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} with {self.heads} heads: dim must be a multiple of heads")
        if not self.scales or any(side < 1 for scale in self.scales for side in scale):
            raise ConfigError(f"scales {list(self.scales)}: give at least one (h, w) of positive sides")
        if any(fine[0] < coarse[0] or fine[1] < coarse[1] for coarse, fine in pairwise(self.scales)):
            raise ConfigError(f"scales {list(self.scales)}: order them from coarse to fine")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path {self.drop_path}: is a rate; give a number in [0, 1)")
        if any(not 0 <= layer < self.layers for layer in self.inject_layers):
            raise ConfigError(f"inject_layers {list(self.inject_layers)}: the layers are 0 to {self.layers - 1}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per scale."""
        return tuple(height * width for height, width in self.scales)


@dataclass
class ScaleCache:
    """Keys and values by slot, and the class rows that modulate every block: the first pass leaves them here."""

    slots: Cache | SequenceCache
    class_RD: Tensor | None = None

    def limit(self, stop: int) -> None:
        """See KVCache.limit."""
        if isinstance(self.slots, Cache):
            self.slots.limit(stop)


class Attention(nn.Module):
    """Multi-head attention over the slots that the window shows; keys have no bias."""

    def __init__(self, config: VARConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.heads
        self.mat_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)
        self.scale_mul_1H11: nn.Parameter | None = None
        if config.l2_attention:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))

    def forward(self, x_RWD: Tensor, window: Window, backend: str) -> Tensor:
        """(R, W, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_RWD = F.linear(x_RWD, self.mat_qkv.weight, bias)
        q_RWHE, k_RWHE, v_RWHE = qkv_RWD.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_RWHE, k_RWHE = self._scaled(q_RWHE, k_RWHE)
        k_RHSE, v_RHSE = window.exchange(self.layer, k_RWHE.to(v_RWHE.dtype), v_RWHE)
        q_RHWE = q_RWHE.to(k_RHSE.dtype).transpose(1, 2)
        out_RHWE = attention(q_RHWE, k_RHSE, v_RHSE, window.mask_R1WS, window.mask_R1WS is None, backend)
        return self.proj(out_RHWE.transpose(1, 2).flatten(-2))

    def _scaled(self, q_RWHE: Tensor, k_RWHE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys for an attention that multiplies their products by E ** -0.5."""
        if self.scale_mul_1H11 is None:
            return q_RWHE * PLAIN_ATTENTION_SCALE, k_RWHE
        scale_1H11 = at_least_float32(self.scale_mul_1H11).clamp_max(math.log(MAX_ATTENTION_SCALE)).exp()
        scale_11H1 = scale_1H11.transpose(1, 2) * q_RWHE.shape[-1] ** 0.5
        return F.normalize(at_least_float32(q_RWHE), dim=-1) * scale_11H1, F.normalize(at_least_float32(k_RWHE), dim=-1)


class FFN(nn.Module):
    """fc2(gelu(fc1 x)), tanh-GELU, with biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation_layer(dim: int, vectors: int) -> nn.Sequential:
    """Class row to `vectors` rows of width D (adaptive layer norm, Peebles and Xie 2022)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, vectors * dim))


def modulation_weight(layer: nn.Sequential) -> Tensor:
    """The matrix of a `modulation_layer`."""
    linear = layer[1]
    assert isinstance(linear, nn.Linear)
    return linear.weight


def modulated(x_RWD: Tensor, scale_R1D: Tensor, shift_R1D: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, LN without weights."""
    return F.layer_norm(x_RWD, x_RWD.shape[-1:], eps=eps) * (1 + scale_R1D) + shift_R1D


class Block(nn.Module):
    """x += attn(LN(x)(1 + scale1) + shift1) gamma1, then x += ffn(LN(x)(1 + scale2) + shift2) gamma2."""

    def __init__(self, config: VARConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = Attention(config, layer)
        self.ffn = FFN(config.dim, round(config.dim * config.mlp_ratio))
        self.drop_path = nn.Dropout(config.drop_path * layer / max(1, config.layers - 1))
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, config.dim))
        else:
            self.ada_lin = modulation_layer(config.dim, 6)

    def modulation(self, class_RD: Tensor, shared_R6D: Tensor | None) -> tuple[Tensor, ...]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (R, 1, D)."""
        six_R6D = self.ada_lin(class_RD).unflatten(-1, (6, -1)) if shared_R6D is None else shared_R6D + self.ada_gss[0]
        return six_R6D[:, None].unbind(2)

    def attend(self, x_RWD: Tensor, six: tuple[Tensor, ...], window: Window, backend: str) -> Tensor:
        """x after the attention's residual."""
        gamma, _, scale, _, shift, _ = six
        branch = self.attn(modulated(x_RWD, scale, shift, self.eps), window, backend) * gamma
        return x_RWD + self._kept(branch)

    def feed(self, x_RWD: Tensor, six: tuple[Tensor, ...]) -> Tensor:
        """x after the FFN's residual."""
        _, gamma, _, scale, _, shift = six
        return x_RWD + self._kept(self.ffn(modulated(x_RWD, scale, shift, self.eps)) * gamma)

    def forward(self, x_RWD: Tensor, class_RD: Tensor, shared_R6D: Tensor | None, window: Window,
                backend: str) -> Tensor:
        """(R, W, D)."""
        six = self.modulation(class_RD, shared_R6D)
        return self.feed(self.attend(x_RWD, six, window, backend), six)

    def _kept(self, branch_RWD: Tensor) -> Tensor:
        """Stochastic depth: whole rows are dropped in training (Huang et al. 2016)."""
        return branch_RWD * self.drop_path(branch_RWD.new_ones(len(branch_RWD), 1, 1))


class HeadNorm(nn.Module):
    """LN(h)(1 + scale) + shift from the class row, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = modulation_layer(dim, 2)

    def forward(self, h_RWD: Tensor, class_RD: Tensor) -> Tensor:
        """(R, W, D), float32 at least."""
        scale_RD, shift_RD = self.ada_lin(class_RD).chunk(2, dim=-1)
        return modulated(at_least_float32(h_RWD), scale_RD[:, None], shift_RD[:, None], self.eps)


class VARTransformer(nn.Module, Backbone):
    """The Backbone of discrete next-scale models.

    `attention_backend` (see `attention`) may be set at any time. The module holds no run state.
    """

    order: ClassVar[str] = "scales"

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "sdpa"
        self.checkpoint_blocks = False      # compute blocks again in the backward pass instead of keeping them
        dim = config.dim
        self.vocab_size = config.vocab_size
        self.prefix_length = config.sizes[0]
        self.inject_points = len(config.inject_layers)
        self.word_embed = nn.Linear(config.codebook_dim, dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.lvl_embed = nn.Embedding(len(config.scales), dim)
        self.pos_start = nn.Parameter(torch.empty(1, config.sizes[0], dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, sum(config.sizes), dim))
        self.shared_ada_lin = modulation_layer(dim, 6) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.head_nm = HeadNorm(dim, config.norm_eps)
        self.head = nn.Linear(dim, config.vocab_size)
        self._init_weights()

    def _init_weights(self) -> None:
        config, std = self.config, (3 * self.config.dim) ** -0.5
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        init_linear(self.modules(), std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            modulation_weight(self.head_nm.ada_lin).mul_(0.5)
            for block in self.blocks:
                assert isinstance(block, Block)
                init_block(block, config)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def levels(self, device: torch.device) -> Tensor:
        """levels_L, int64: the scale of each slot."""
        sizes_S = torch.tensor(self.config.sizes, device=device)
        return torch.repeat_interleave(torch.arange(len(sizes_S), device=device), sizes_S)

    def drop(self, condition: Condition, dropped_B: Tensor) -> Condition:
        """The null class on the rows where the bool `dropped_B` is true, for training with dropped conditions.

        The released forward() drops labels in eval mode too; here only a training objective drops them.
        """
        return Condition(class_ids_B=self._class_ids(condition).masked_fill(dropped_B, self.config.num_classes))

    def null(self, condition: Condition) -> Condition:
        """The null class for every row."""
        return Condition(class_ids_B=torch.full_like(self._class_ids(condition), self.config.num_classes))

    def _class_ids(self, condition: Condition) -> Tensor:
        if condition.class_ids_B is None:
            raise InputError("a caption for a class-conditional model; give a class instead")
        return condition.class_ids_B

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> ScaleCache:
        """An empty cache of `length` slots, the first ones of all scales. `store=False`: for one differentiable pass
        over the slots 0 .. W-1. There are no padded and no scratch slots.

        Raises InputError when `grid` is not the model's finest scale.
        """
        config, weight = self.config, self.pos_1LC
        assert prefix_mask_RP is None and scratch == 0 and length <= weight.shape[1], (length, scratch)
        if grid != config.scales[-1]:
            raise InputError(f"grid {grid[0]}x{grid[1]}: this model paints {config.scales[-1][0]}x"
                             f"{config.scales[-1][1]} tokens only; leave the size out")
        no_rope_SF2 = weight.new_zeros(length, 0, 2)
        if not store:
            return ScaleCache(SequenceCache(no_rope_SF2))
        shape = (rows, config.heads, length, config.dim // config.heads)
        empty_RS = torch.zeros(rows, length, dtype=torch.bool, device=weight.device)
        return ScaleCache(Cache(no_rope_SF2, ~empty_RS, empty_RS, keys=[weight.new_zeros(shape) for _ in self.blocks],
                                values=[weight.new_zeros(shape) for _ in self.blocks]))

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD: the class row at every slot of the first scale."""
        return self.class_emb(self._class_ids(condition))[:, None].expand(-1, self.prefix_length, -1)

    def embed(self, latents_RWC: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD of map cells; `step` adds what depends on the slot."""
        return self.word_embed(latents_RWC.to(self.word_embed.weight.dtype))

    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: ScaleCache, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """h_RWD, float32, normed for the head; see Backbone.step. A pass reads whole scales; the first one of a cache
        begins at slot 0. A query sees its own scale and the coarser ones, unless `mask_RWW` says otherwise."""
        h_RWD = self.features(x_RWD, slots_RW, cache, inject_KRWD, mask_RWW)
        assert cache.class_RD is not None and at_RW is None
        return self.head_nm(h_RWD, cache.class_RD[:len(h_RWD)])

    def features(self, x_RWD: Tensor, slots_RW: Tensor, cache: ScaleCache, inject_KRWD: Tensor | None = None,
                 mask_RWW: Tensor | None = None) -> Tensor:
        """h_RWD after the last block, before the head's norm."""
        if cache.class_RD is None:
            cache.class_RD = x_RWD[:, 0]
        class_RD = cache.class_RD[:len(x_RWD)]
        shared_R6D = None if self.shared_ada_lin is None else self.shared_ada_lin(class_RD).unflatten(-1, (6, -1))
        levels_RW = self.levels(x_RWD.device)[slots_RW]
        if mask_RWW is None:
            mask_RWW = levels_RW[:, :, None] >= levels_RW[:, None, :]
        window = cache.slots.open(slots_RW, mask_RWW)
        x_RWD = x_RWD + self.places(slots_RW, levels_RW)
        for index, block in enumerate(self.blocks):
            if inject_KRWD is not None:
                for k, place in enumerate(self.config.inject_layers):
                    if place == index:
                        x_RWD = x_RWD + inject_KRWD[k].to(x_RWD.dtype)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_RWD = checkpoint(block, x_RWD, class_RD, shared_R6D, window, self.attention_backend,
                                   use_reentrant=False)
            else:
                x_RWD = block(x_RWD, class_RD, shared_R6D, window, self.attention_backend)
        return x_RWD

    def places(self, slots_RW: Tensor, levels_RW: Tensor) -> Tensor:
        """(R, W, D): level and position embeddings, and pos_start on the first scale."""
        start_LD = F.pad(self.pos_start[0], (0, 0, 0, self.pos_1LC.shape[1] - self.prefix_length))
        return self.lvl_embed(levels_RW) + (self.pos_1LC[0] + start_LD)[slots_RW]

    def logits(self, h_RWD: Tensor) -> Tensor:
        """logits_RWV, float32 at least."""
        with torch.autocast(h_RWD.device.type, enabled=False):
            h_RWD = at_least_float32(h_RWD)
            return F.linear(h_RWD, self.head.weight.to(h_RWD.dtype), self.head.bias.to(h_RWD.dtype))

    def forward(self, latents_BNC: Tensor, condition: Condition, inject_KBLD: Tensor | None = None) -> Tensor:
        """Teacher-forced logits_BLV in one differentiable block-causal pass. latents_BNC: the cells that the slots
        after the first scale read, N = L - P (accel.scale.scale_inputs)."""
        slots_BL = torch.arange(self.prefix_length + latents_BNC.shape[1], device=latents_BNC.device)[None]
        x_BLD = torch.cat([self.prefix(condition), self.embed(latents_BNC, slots_BL)], dim=1)
        cache = self.new_cache(len(x_BLD), x_BLD.shape[1], self.config.scales[-1], store=False)
        return self.logits(self.step(x_BLD, slots_BL, cache, inject_KBLD))


def init_linear(modules: Iterable[nn.Module], std: float) -> None:
    """Truncated normal weights and zero biases of linear layers and tables."""
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def init_block(block: Block, config: VARConfig) -> None:
    """The release's scaling of a fresh block: thin residual branches, gates near `gamma_init`."""
    for output in (block.attn.proj, block.ffn.fc2):
        output.weight.div_((2 * config.layers) ** 0.5)
    if config.shared_adaln:
        nn.init.normal_(block.ada_gss, std=config.dim ** -0.5)
        six = block.ada_gss[0, 0]
    else:
        six = modulation_weight(block.ada_lin).unflatten(0, (6, -1))
    six[:2].mul_(config.gamma_init)
    six[2:].mul_(0.5)
