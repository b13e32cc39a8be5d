"""MAR, masked autoregression over continuous tokens (Li et al. 2024, arXiv:2406.11838). State-dict keys are MAR's.

An encoder reads the known tokens behind a buffer of class rows; a decoder reads its output with a mask token in every
empty place and says z for every token; a diffusion head draws tokens from z. Control (ours): inject_KBLD[k] is added to
the token rows before encoder block `inject_encoder[k]`; the points after those belong to `inject_decoder`.

Letters: B images (or contexts of images); L tokens; C channels of a token; E, D width of encoder and decoder; T buffer
rows; V rows for known tokens; K injection points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arimg.config import check_sizes
from arimg.errors import ConfigError, InputError
from arimg.models.base import Condition, Order
from arimg.models.diffusion_head import HeadConfig, build_head
from arimg.models.layers import attention


@dataclass(frozen=True)
class MARConfig:
    """Shape of one model; published sizes in presets.MAR_PRESETS. Raises ConfigError."""

    latent_channels: int = 16           # of the tokenizer
    patch: int = 1                      # latent cells per token side: 2 for KL-8
    grid: int = 16                      # tokens per side
    encoder_dim: int = 768
    encoder_layers: int = 12
    encoder_heads: int = 12
    decoder_dim: int = 768
    decoder_layers: int = 12
    decoder_heads: int = 12
    mlp_ratio: float = 4.0
    buffer: int = 64
    num_classes: int = 1000
    class_dropout: float = 0.1          # rate of dropped classes in training
    attention_dropout: float = 0.1
    dropout: float = 0.1
    norm_eps: float = 1e-6
    inject_encoder: tuple[int, ...] = ()
    inject_decoder: tuple[int, ...] = ()
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        check_sizes(self, "buffer")
        for name in ("inject_encoder", "inject_decoder"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for part in ("encoder", "decoder"):
            dim, heads, layers = (getattr(self, f"{part}_{name}") for name in ("dim", "heads", "layers"))
            if dim % heads:
                raise ConfigError(f"{part}_dim {dim} with {part}_heads {heads}: the heads must divide the width")
            places = getattr(self, f"inject_{part}")
            if any(not 0 <= layer < layers for layer in places):
                raise ConfigError(f"inject_{part} {list(places)}: the layers are 0 to {layers - 1}")
        if self.inject_encoder and self.inject_decoder and self.encoder_dim != self.decoder_dim:
            raise ConfigError(f"encoder_dim {self.encoder_dim}, decoder_dim {self.decoder_dim}: a control on both "
                              "sides needs equal widths")

    @property
    def conditioning(self) -> str:
        """What a picture is described by."""
        return "class"

    @property
    def inject_layers(self) -> tuple[int, ...]:
        """One entry per injection point."""
        return self.inject_encoder + self.inject_decoder

    @property
    def dim(self) -> int:
        """Width of what a control adds."""
        return self.encoder_dim if self.inject_encoder else self.decoder_dim

    @property
    def token_channels(self) -> int:
        """C."""
        return self.latent_channels * self.patch ** 2


class Visible(NamedTuple):
    """The encoder's output, and where its token rows belong."""

    h_BSE: Tensor               # S = T + V
    index_BV: Tensor            # positions in ascending order; filled up with others where a row knows fewer
    real_BV: Tensor | None      # bool, False on the fill; None = all real


class Block(nn.Module):
    """Pre-norm ViT block with the parameter names of timm's."""

    def __init__(self, dim: int, heads: int, config: MARConfig) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio + 1e-6)     # a ratio read off a file may fall a last bit short
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.drop = nn.Dropout(config.dropout)
        self.attn_drop = nn.Dropout(config.attention_dropout)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None, backend: str) -> Tensor:
        """x + attention(norm(x)), then h + mlp(norm(h)), erf-GELU. `mask_B11S`: bool, keys that may be seen."""
        q, k, v = self.attn["qkv"](self.norm1(x_BSD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.training and self.attn_drop.p:
            out = F.scaled_dot_product_attention(q, k, v, mask_B11S, dropout_p=self.attn_drop.p)
        else:
            out = attention(q, k, v, mask_B11S, backend=backend)
        x_BSD = x_BSD + self.drop(self.attn["proj"](out.transpose(1, 2).flatten(-2)))
        hidden = self.drop(F.gelu(self.mlp["fc1"](self.norm2(x_BSD))))
        return x_BSD + self.drop(self.mlp["fc2"](hidden))


class MARTransformer(nn.Module):
    """The MaskedBackbone of MAR; see models/base.py. `attention_backend` may be set at any time."""

    order: Order = "continuous"

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "sdpa"
        self.checkpoint_blocks = False      # compute blocks again in the backward pass instead of keeping them
        self.channels = config.token_channels
        self.inject_points = len(config.inject_layers)
        length, encoder, decoder = config.grid ** 2, config.encoder_dim, config.decoder_dim
        self.class_emb = nn.Embedding(config.num_classes, encoder)
        self.fake_latent = nn.Parameter(torch.empty(1, encoder))
        self.z_proj = nn.Linear(self.channels, encoder)
        self.z_proj_ln = nn.LayerNorm(encoder, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, config.buffer + length, encoder))
        self.encoder_blocks = nn.ModuleList(Block(encoder, config.encoder_heads, config)
                                            for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(encoder, eps=config.norm_eps)
        self.decoder_embed = nn.Linear(encoder, decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, config.buffer + length, decoder))
        self.decoder_blocks = nn.ModuleList(Block(decoder, config.decoder_heads, config)
                                            for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(decoder, eps=config.norm_eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, length, decoder))
        self._init_weights()
        self.diffloss = build_head(config.head, self.channels, decoder)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for tensor in (self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
                       self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned):
            nn.init.normal_(tensor, std=0.02)

    @property
    def head(self) -> nn.Module:
        """The diffusion or flow head, under MAR's name for it in the state dict."""
        return self.diffloss

    @property
    def layers(self) -> list[nn.Module]:
        """All blocks."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def drop(self, condition: Condition, dropped_B: Tensor) -> Condition:
        """The null class on the rows where the bool `dropped_B` is true. Raises InputError on a caption."""
        if condition.class_ids_B is None:
            raise InputError("a caption for a class-conditional model; give a class instead")
        return Condition(class_ids_B=condition.class_ids_B.masked_fill(dropped_B, self.config.num_classes))

    def null(self, condition: Condition) -> Condition:
        """The null class: `fake_latent`, as id num_classes."""
        return self.drop(condition, torch.ones(condition.rows, dtype=torch.bool, device=self.fake_latent.device))

    def class_rows(self, condition: Condition) -> Tensor:
        """x_BE. Raises InputError on a caption."""
        if condition.class_ids_B is None:
            raise InputError("a caption for a class-conditional model; give a class instead")
        null_B = condition.class_ids_B == self.config.num_classes
        rows_BE = self.class_emb(condition.class_ids_B.masked_fill(null_B, 0))
        return torch.where(null_B[:, None], self.fake_latent, rows_BE)

    def context(self, condition: Condition, latents_RLC: Tensor, known_RL: Tensor,
                inject_KRLD: Tensor | None = None) -> Tensor:
        """See MaskedBackbone. Raises InputError on another number of tokens than the model has positions for."""
        side = self.config.grid
        if known_RL.shape[1] != side ** 2:
            raise InputError(f"{known_RL.shape[1]} tokens: this model was trained on {side}x{side}, and its positions "
                             "are learned; leave the size out")
        return self.decode(self.encode(condition, latents_RLC, known_RL, inject_KRLD), inject_KRLD)

    def encode(self, condition: Condition, latents_RLC: Tensor, known_RL: Tensor,
               inject_KRLD: Tensor | None = None) -> Visible:
        """The buffer and the known tokens, in ascending order of position."""
        buffer = self.config.buffer
        counts = known_RL.sum(1)
        width, ragged = int(counts.max()), bool((counts != counts.max()).any())
        index_RV = (~known_RL).byte().argsort(dim=1, stable=True)[:, :width]
        real_RV = torch.arange(width, device=known_RL.device) < counts[:, None] if ragged else None
        tokens_RVE = self.z_proj(_rows(latents_RLC.to(self.z_proj.weight.dtype), index_RV))
        tokens_RVE = tokens_RVE + self.encoder_pos_embed_learned[0, buffer:][index_RV]
        first_RTE = self.class_rows(condition)[:, None] + self.encoder_pos_embed_learned[:, :buffer]
        x_RSE = self.z_proj_ln(torch.cat([first_RTE, tokens_RVE], dim=1))
        mask = None if real_RV is None else F.pad(real_RV, (buffer, 0), value=True)[:, None, None]
        for layer, block in enumerate(self.encoder_blocks):
            for k in (k for k, place in enumerate(self.config.inject_encoder) if place == layer):
                if inject_KRLD is not None:
                    here = _rows(inject_KRLD[k], index_RV[:inject_KRLD.shape[1]])
                    x_RSE = _added(x_RSE, here, buffer)
            x_RSE = self._run(block, x_RSE, mask)
        return Visible(self.encoder_norm(x_RSE), index_RV, real_RV)

    def decode(self, visible: Visible, inject_KRLD: Tensor | None = None) -> Tensor:
        """z_RLD: a mask token in every empty place, and all of them seen by all."""
        buffer = self.config.buffer
        x_RSD = self.decoder_embed(visible.h_BSE)
        first_RTD, known_RVD = x_RSD[:, :buffer], x_RSD[:, buffer:]
        if visible.real_BV is not None:
            known_RVD = torch.where(visible.real_BV[..., None], known_RVD, self.mask_token)
        tokens_RLD = self.mask_token.expand(len(x_RSD), self.config.grid ** 2, -1)
        tokens_RLD = tokens_RLD.scatter(1, visible.index_BV[..., None].expand_as(known_RVD), known_RVD)
        x_RSD = torch.cat([first_RTD, tokens_RLD], dim=1) + self.decoder_pos_embed_learned
        before = len(self.config.inject_encoder)
        for layer, block in enumerate(self.decoder_blocks):
            for k in (k for k, place in enumerate(self.config.inject_decoder) if place == layer):
                if inject_KRLD is not None:
                    x_RSD = _added(x_RSD, inject_KRLD[before + k], buffer)
            x_RSD = self._run(block, x_RSD, None)
        return self.decoder_norm(x_RSD)[:, buffer:] + self.diffusion_pos_embed_learned

    def _run(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """A block's output."""
        y: Tensor
        if self.checkpoint_blocks and torch.is_grad_enabled():
            y = checkpoint(block, x, mask, self.attention_backend, use_reentrant=False)
        else:
            y = block(x, mask, self.attention_backend)
        return y


def _rows(x_RLD: Tensor, index_RV: Tensor) -> Tensor:
    """x_RVD: those tokens of each row."""
    return x_RLD.gather(1, index_RV[..., None].expand(-1, -1, x_RLD.shape[-1]))


def _added(x_RSD: Tensor, inject_RVD: Tensor, buffer: int) -> Tensor:
    """x with `inject_RVD` added to the token rows of its first rows."""
    return x_RSD + F.pad(inject_RVD.to(x_RSD.dtype), (0, 0, buffer, 0, 0, len(x_RSD) - len(inject_RVD)))
