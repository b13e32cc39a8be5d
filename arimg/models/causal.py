"""A causal transformer over continuous tokens with MAR's head: the autoregressive baseline of MAR's paper (Li et al.
2024, arXiv:2406.11838, section 4.2, whose code was never released), with ControlAR's injection points.

Prefix rows of the class, then projected tokens with a learned position; the output at slot P-1+j plus a learned vector
for the place of token j is z_j. Blocks, rotary positions and cache are those of the discrete model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arimg.config import check_sizes
from arimg.errors import InputError
from arimg.models.ar import ARConfig, Block
from arimg.models.base import Condition, Order
from arimg.models.diffusion_head import HeadConfig, build_head
from arimg.models.layers import Cache, RMSNorm, SequenceCache, Window, rotary_table_2d


@dataclass(frozen=True)
class CausalConfig:
    """Shape of one model. Raises ConfigError."""

    latent_channels: int = 16           # of the tokenizer
    patch: int = 1                      # latent cells per token side
    grid: int = 16                      # tokens per side, at most
    dim: int = 768
    layers: int = 24
    heads: int = 12
    ffn_hidden: int = 2048
    prefix_rows: int = 1                # P: class rows in front of the tokens
    num_classes: int = 1000
    class_dropout: float = 0.1          # rate of dropped classes in training
    dropout: float = 0.1
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    inject_layers: tuple[int, ...] = ()
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        check_sizes(self)
        object.__setattr__(self, "inject_layers", tuple(self.inject_layers))
        self.trunk()

    def trunk(self) -> ARConfig:
        """The config of the blocks. Raises ConfigError."""
        return ARConfig(dim=self.dim, layers=self.layers, heads=self.heads, ffn_hidden=self.ffn_hidden,
                        inject_layers=self.inject_layers, norm_eps=self.norm_eps, residual_dropout=self.dropout,
                        ffn_dropout=self.dropout)

    @property
    def conditioning(self) -> str:
        """What a picture is described by."""
        return "class"

    @property
    def token_channels(self) -> int:
        """C."""
        return self.latent_channels * self.patch ** 2


class CausalTransformer(nn.Module):
    """A Backbone of continuous tokens (models/base.py): `step` returns z, `head` draws tokens from it."""

    order: Order = "continuous"

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "sdpa"
        self.checkpoint_blocks = False      # compute blocks again in the backward pass instead of keeping them
        self.channels = config.token_channels
        self.prefix_length = config.prefix_rows
        self.inject_points = len(config.inject_layers)
        trunk, cells = config.trunk(), config.grid ** 2
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)     # the last row is the null class
        self.prefix_positions = nn.Parameter(torch.empty(config.prefix_rows, config.dim))
        self.input = nn.Linear(self.channels, config.dim)
        self.input_positions = nn.Parameter(torch.empty(cells, config.dim))
        self.layers = nn.ModuleList(Block(trunk, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output_positions = nn.Parameter(torch.empty(cells, config.dim))
        self._init_weights()
        self.head = build_head(config.head, self.channels, config.dim)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.input.bias)
        for tensor in (self.prefix_positions, self.input_positions, self.output_positions):
            nn.init.normal_(tensor, std=0.02)

    def drop(self, condition: Condition, dropped_B: Tensor) -> Condition:
        """The null class on the rows where the bool `dropped_B` is true. Raises InputError on a caption."""
        if condition.class_ids_B is None:
            raise InputError("a caption for a class-conditional model; give a class instead")
        return Condition(class_ids_B=condition.class_ids_B.masked_fill(dropped_B, self.config.num_classes))

    def null(self, condition: Condition) -> Condition:
        """The null class."""
        return self.drop(condition, torch.ones(condition.rows, dtype=torch.bool, device=self.norm.weight.device))

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> Cache | SequenceCache:
        """See Backbone. Raises InputError on a grid with more tokens than the model has positions for."""
        (height, width), cells = grid, self.config.grid ** 2
        if height * width > cells:
            raise InputError(f"grid {height}x{width} has {height * width} tokens: this model knows {cells} positions; "
                             "choose a smaller size")
        weight = self.norm.weight
        trunk = self.config.trunk()
        cells_L = torch.arange(height * width, device=weight.device)
        rope_SF2 = rotary_table_2d(cells_L, width, trunk.head_dim, self.config.rope_base, self.prefix_length,
                                   identity=True)[:length]
        if not store:
            return SequenceCache(rope_SF2)
        real_RS = torch.ones(rows, length + scratch, dtype=torch.bool, device=weight.device)
        shape = (rows, trunk.key_heads, length + scratch, trunk.head_dim)
        return Cache(rope_SF2, real_RS, torch.zeros_like(real_RS), keys=[weight.new_zeros(shape) for _ in self.layers],
                     values=[weight.new_zeros(shape) for _ in self.layers])

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD. Raises InputError on a caption."""
        if condition.class_ids_B is None:
            raise InputError("a caption for a class-conditional model; give a class instead")
        return self.class_embedding(condition.class_ids_B)[:, None] + self.prefix_positions

    def embed(self, latents_RWC: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD of tokens read at these slots."""
        return self.input(latents_RWC.to(self.input.weight.dtype)) + self.input_positions[slots_RW - self.prefix_length]

    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: Cache | SequenceCache, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """z_RWD of the tokens that these slots predict; meaningless before the last prefix slot and behind the last
        token. See Backbone.step."""
        h_RWD = self._layers(x_RWD, cache.open(slots_RW, mask_RWW, at_RW), inject_KRWD)
        predicted_RW = (slots_RW if at_RW is None else at_RW) - self.prefix_length + 1
        return h_RWD + self.output_positions[predicted_RW.clamp(0, len(self.output_positions) - 1)]

    def _layers(self, x_RWD: Tensor, window: Window, inject_KRWD: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            for k in (k for k, place in enumerate(self.config.inject_layers) if place == index):
                if inject_KRWD is not None:
                    x_RWD = x_RWD + inject_KRWD[k].to(x_RWD.dtype)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_RWD = checkpoint(layer, x_RWD, window, self.attention_backend, use_reentrant=False)
            else:
                x_RWD = layer(x_RWD, window, self.attention_backend)
        return self.norm(x_RWD)

    def forward(self, latents_BLC: Tensor, condition: Condition, grid: tuple[int, int],
                inject_KBLD: Tensor | None = None) -> Tensor:
        """Teacher-forced z_BLD in one differentiable pass; row j of inject_KBLD belongs to the slot that predicts
        token j."""
        batch, length = latents_BLC.shape[:2]
        slots_BS = torch.arange(self.prefix_length + length - 1, device=latents_BLC.device).expand(batch, -1)
        tokens_BWD = self.embed(latents_BLC[:, :-1], slots_BS[:, self.prefix_length:])
        x_BSD = torch.cat([self.prefix(condition), tokens_BWD], dim=1)
        if inject_KBLD is not None:
            inject_KBLD = F.pad(inject_KBLD, (0, 0, self.prefix_length - 1, 0))
        cache = self.new_cache(batch, slots_BS.shape[1], grid, store=False)
        return self.step(x_BSD, slots_BS, cache, inject_KBLD)[:, self.prefix_length - 1:]
