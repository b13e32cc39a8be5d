"""The autoregressive transformer of LlamaGen (Sun et al. 2024, arXiv:2406.06525), with ControlAR's injection points
(Li et al. 2024, arXiv:2410.02705). State-dict keys are LlamaGen's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import isqrt
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arimg.config import check_sizes
from arimg.errors import ConfigError, InputError
from arimg.kernels import build_error
from arimg.models.base import Backbone, Condition
from arimg.models.layers import (EXTENT_STEP, MLP, Attention, Cache, RMSNorm, SequenceCache, SwiGLU, Window,
                                 at_least_float32, rotary_table_2d)
from arimg.noise import CounterNoise, Purpose


@dataclass(frozen=True)
class ARConfig:
    """Shape and conventions of one model. Raises ConfigError on values that do not fit together."""

    vocab_size: int = 16384
    dim: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None             # None = heads; fewer = grouped-query attention
    ffn_hidden: int = 2048
    block_size: int = 256                   # cells of the square grid that the released rotary table is built for
    conditioning: str = "class"             # class | text
    num_classes: int = 1000
    class_dropout: float = 0.1              # rate of dropped conditions; > 0 gives the class table its null row
    caption_dim: int = 2048
    caption_length: int = 120
    rope_base: float = 10000.0
    rope_prefix: str = "zero"               # zero (released weights) | identity (new models)
    rope_grid: str = "table"                # table: first cells of the square table (released) | true: own cells
    inject_layers: tuple[int, ...] = ()     # injection k is added before layer inject_layers[k]
    norm_eps: float = 1e-5
    codebook_dim: int | None = None         # width of the codebook that embedding and head are tied to; None = not tied
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_sizes(self)
        object.__setattr__(self, "inject_layers", tuple(self.inject_layers))
        for name, choices in (("conditioning", ("class", "text")), ("rope_prefix", ("zero", "identity")),
                              ("rope_grid", ("table", "true"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r}: choose {' or '.join(choices)}")
        if self.dim % self.heads or self.head_dim % 4:
            raise ConfigError(f"dim {self.dim} with {self.heads} heads: each head needs a multiple of 4 channels")
        if self.heads % self.key_heads:
            raise ConfigError(f"kv_heads {self.kv_heads}: must divide heads ({self.heads})")
        if isqrt(self.block_size) ** 2 != self.block_size:
            raise ConfigError(f"block_size {self.block_size}: needs a square number, for example 256 for 16x16 tokens")
        if any(not 0 <= layer < self.layers for layer in self.inject_layers):
            raise ConfigError(f"inject_layers {list(self.inject_layers)}: the layers are 0 to {self.layers - 1}")

    @property
    def prefix_length(self) -> int:
        """P."""
        return 1 if self.conditioning == "class" else self.caption_length

    @property
    def head_dim(self) -> int:
        """E."""
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """G."""
        return self.heads if self.kv_heads is None else self.kv_heads


def rotary_table(config: ARConfig, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """table_SF2 of the prefix and the h*w cells, float32. Raises InputError when the grid is too large."""
    height, width = grid
    if config.rope_grid == "table":
        if height * width > config.block_size:
            raise InputError(f"grid {height}x{width} has {height * width} tokens: this model's rotary table ends "
                             f"at {config.block_size}; choose a smaller size")
        width = isqrt(config.block_size)
    cells_L = torch.arange(grid[0] * grid[1], device=device)
    return rotary_table_2d(cells_L, width, config.head_dim, config.rope_base, config.prefix_length,
                           identity=config.rope_prefix == "identity")


def _unchecked(device: torch.device) -> dict[str, Any]:
    """Options of torch.compile: a pass does not look again at the network and at sizes that follow from its input's. On
    a CPU it calls its kernels from C++, which takes a tenth off a step of LlamaGen-B (docs/bench.md)."""
    wanted = {"size_asserts": False, "alignment_asserts": False, "cpp_wrapper": device.type == "cpu",
              "cpp.min_chunk_size": 4096}         # elements that are worth a thread
    known = torch._inductor.list_options()
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    if skip := getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None):        # since torch 2.8
        options["guard_filter_fn"] = skip
    return options


_COPIES = count()


def _with_own_code(method: Any) -> Any:
    """The same bound method with a code object that no other has: torch.compile keeps its graphs by code object, and
    what it no longer looks at would let one network run the graph of another, with its quantised weights."""
    function = method.__func__
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}")
    return MethodType(FunctionType(code, function.__globals__, closure=function.__closure__), method.__self__)


class ClassEmbedding(nn.Module):
    """One prefix slot per class id; with class_dropout > 0 one more row, the null class."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.null_id = config.num_classes if config.class_dropout > 0 else None
        self.embedding_table = nn.Embedding(config.num_classes + (self.null_id is not None), config.dim)

    def forward(self, condition: Condition) -> Tensor:
        """x_B1D. Raises InputError when the condition is a caption."""
        if condition.class_ids_B is None:
            raise InputError("a caption for a class-conditional model; give a class instead")
        return self.embedding_table(condition.class_ids_B)[:, None]

    def drop(self, condition: Condition, dropped_B: Tensor) -> Condition:
        """The null class where `dropped_B`. Raises InputError when the model has no null class."""
        assert condition.class_ids_B is not None
        if self.null_id is None:
            raise InputError("this model was built without a null class (class_dropout 0), so it has no guidance; "
                             "use --cfg 1")
        return Condition(class_ids_B=condition.class_ids_B.masked_fill(dropped_B, self.null_id))


class CaptionEmbedding(nn.Module):
    """One prefix slot per caption slot. The null caption is a fixed random buffer N(0, 1/C), as released."""

    uncond_embedding: Tensor

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.cap_proj = MLP(config.caption_dim, config.dim)
        seed, positions = torch.zeros(1, dtype=torch.int64), torch.arange(config.caption_length)[None]
        null_PC = CounterNoise().normal(seed, positions, config.caption_dim, Purpose.TEXT)[0]
        self.register_buffer("uncond_embedding", null_PC / config.caption_dim ** 0.5)

    def forward(self, condition: Condition) -> Tensor:
        """x_BPD. Raises InputError when the caption is missing or has another shape than the model reads."""
        caption = condition.caption_BPC
        if caption is None:
            raise InputError("a class for a text-conditional model; give a prompt instead")
        if caption.shape[1:] != self.uncond_embedding.shape:
            raise InputError(f"caption features of shape {tuple(caption.shape[1:])}: this model reads "
                             f"{tuple(self.uncond_embedding.shape)} (slots, channels)")
        return self.cap_proj(caption.to(self.cap_proj.fc1.weight.dtype))

    def drop(self, condition: Condition, dropped_B: Tensor) -> Condition:
        """The null caption where `dropped_B`; the mask stays the prompt's own."""
        assert condition.caption_BPC is not None
        null_PC = self.uncond_embedding.to(condition.caption_BPC.dtype)
        caption = torch.where(dropped_B[:, None, None], null_PC, condition.caption_BPC)
        return Condition(caption_BPC=caption, caption_mask_BP=condition.caption_mask_BP)


class Block(nn.Module):
    """h = x + attention(norm(x)); h + ffn(norm(h))."""

    def __init__(self, config: ARConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(layer, config.dim, config.heads, config.key_heads, config.residual_dropout)
        self.feed_forward = SwiGLU(config.dim, config.ffn_hidden, config.ffn_dropout)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_RWD: Tensor, window: Window, backend: str) -> Tensor:
        """(R, W, D)."""
        h_RWD = x_RWD + self.attention(self.attention_norm(x_RWD), window, backend)
        return h_RWD + self.feed_forward(self.ffn_norm(h_RWD))


class ARTransformer(nn.Module, Backbone):
    """The Backbone of discrete raster-order models; see models/base.py for slots and letters.

    `attention_backend` (see `attention`) and `kv_dtype` (that of keys and values that are kept; None = the weights')
    may be set at any time. The module holds no run state.
    """

    codebook: Tensor

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend = "sdpa"
        self.kv_dtype: torch.dtype | None = None
        self.checkpoint_blocks = False      # compute blocks again in the backward pass instead of keeping them
        self.extent_step = EXTENT_STEP
        self._compiled: dict[str, Callable[..., Tensor]] = {}
        self.vocab_size = config.vocab_size
        self.prefix_length = config.prefix_length
        self.inject_points = len(config.inject_layers)
        embedding = ClassEmbedding if config.conditioning == "class" else CaptionEmbedding
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = embedding(config)
        self.tok_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.codebook_dim is not None:
            self.register_buffer("codebook", torch.zeros(config.vocab_size, config.codebook_dim))
            self.codebook_in = nn.Linear(config.codebook_dim, config.dim, bias=False)
            self.codebook_out = nn.Linear(config.dim, config.codebook_dim, bias=False)
            self.codebook_scale = nn.Parameter(torch.ones(()))
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def set_codebook(self, codebook_VC: Tensor) -> None:
        """Store the tokenizer's codebook. Raises ConfigError when the model is not tied to one of this shape."""
        wanted = (self.config.vocab_size, self.config.codebook_dim)
        if tuple(codebook_VC.shape) != wanted:
            raise ConfigError(f"codebook of shape {tuple(codebook_VC.shape)}: the model's vocab_size, codebook_dim are "
                              f"{wanted}")
        self.codebook.copy_(codebook_VC.detach())

    def drop(self, condition: Condition, dropped_B: Tensor) -> Condition:
        """The null condition on the rows where the bool `dropped_B` is true, for training with dropped conditions."""
        return self.cls_embedding.drop(condition, dropped_B)

    def null(self, condition: Condition) -> Condition:
        """The unconditional twin: null class, or the stored null caption under the prompt's own mask."""
        return self.drop(condition, torch.ones(condition.rows, dtype=torch.bool, device=self.norm.weight.device))

    def rotary_table(self, grid: tuple[int, int]) -> Tensor:
        """See the function of that name."""
        return rotary_table(self.config, grid, self.norm.weight.device)

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> Cache | SequenceCache:
        """An empty cache of `length` <= P + h*w slots, and `scratch` more behind them. `store=False`: for one
        differentiable pass over slots 0 .. W-1.

        `prefix_mask_RP` (bool) is True on real caption slots. Raises InputError, see `rotary_table`.
        """
        rope_SF2 = self.rotary_table(grid)[:length]
        assert rope_SF2.shape[0] == length, (length, grid)
        slots, real_RS = length + scratch, None
        if prefix_mask_RP is not None:
            real_RS = F.pad(prefix_mask_RP.bool(), (0, slots - prefix_mask_RP.shape[1]), value=True)
        if not store:
            return SequenceCache(rope_SF2, real_RS)
        weight = self.norm.weight
        shape = (rows, self.config.key_heads, slots, self.config.head_dim)
        keys, values = ([weight.new_zeros(shape, dtype=self.kv_dtype) for _ in self.layers] for _ in range(2))
        empty_RS = torch.zeros(rows, slots, dtype=torch.bool, device=weight.device)
        return Cache(rope_SF2, ~empty_RS if real_RS is None else real_RS, empty_RS, keys, values, self.extent_step)

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD: the class row or the caption rows."""
        return self.tok_dropout(self.cls_embedding(condition))

    @torch.no_grad()
    def embedding_table(self) -> Tensor:
        """x_VD: what `embed` gives for each code, without dropout, float32."""
        table_VD = self.tok_embeddings.get_parameter("weight").float()
        if self.config.codebook_dim is not None:
            table_VD = table_VD + F.linear(self.codebook.float(), self.codebook_in.weight.float())
        return table_VD

    def embed(self, codes_RW: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD of int64 codes; positions enter by the rotary table, so `slots_RW` does not matter here."""
        x_RWD = self.tok_embeddings(codes_RW)
        if self.config.codebook_dim is not None:
            x_RWD = x_RWD + self.codebook_in(self.codebook[codes_RW])
        return self.tok_dropout(x_RWD)

    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: Cache | SequenceCache, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """h_RWD; see Backbone.step. inject_KRWD[k] is added to the residual stream before layer inject_layers[k]
        (ControlAR, conditional decoding); rows beyond the cache's first R are left alone."""
        return self._layers(x_RWD, cache.open(slots_RW, mask_RWW, at_RW), inject_KRWD)

    def features(self, x_RWD: Tensor, slots_RW: Tensor, cache: Cache | SequenceCache,
                 inject_KRWD: Tensor | None = None) -> Tensor:
        """h_RWD after the last layer, before the final norm; else as `step`."""
        return self._compiled.get("_blocks", self._blocks)(x_RWD, cache.open(slots_RW), inject_KRWD)

    def predict(self, x_RWD: Tensor, slots_RW: Tensor, cache: Cache, inject_KRWD: Tensor | None = None,
                at_RW: Tensor | None = None) -> Tensor:
        """See Backbone; float32 at least."""
        columns_S = cache.advance(slots_RW, anywhere=at_RW is not None)
        if self._compiled and self.extent_step != sys.maxsize:
            torch._dynamo.maybe_mark_dynamic(columns_S, 0)          # one graph for all lengths
        return self._compiled.get("_pass", self._pass)(x_RWD, slots_RW, columns_S, cache, inject_KRWD, at_RW)

    def compile_step(self, **options: Any) -> None:
        """Compile `predict` and the layers of `features` with torch.compile(fullgraph=True, **options): one graph per
        number of rows and positions, for any number of slots on a CPU and for the whole cache elsewhere. The first pass
        of each shape takes long. The network's settings and layers must not change afterwards: nothing looks whether
        they did."""
        if self.norm.weight.device.type == "cpu":
            build_error("draw")                     # where it cannot be built, the same draws take longer
            if self.attention_backend in ("sdpa", "exact"):     # sdpa takes twice as long for few queries
                exact = self.norm.weight.dtype != torch.float64 and build_error("attention") is None
                self.attention_backend = "exact" if exact else "math"
        else:
            self.extent_step = sys.maxsize
        options = options or {"options": _unchecked(self.norm.weight.device)}
        self._compiled = {name: torch.compile(_with_own_code(getattr(self, name)), fullgraph=True, dynamic=False,
                                              **options)
                          for name in ("_pass", "_blocks")}

    def _pass(self, x_RWD: Tensor, slots_RW: Tensor, columns_S: Tensor, cache: Cache, inject_KRWD: Tensor | None,
              at_RW: Tensor | None) -> Tensor:
        window = cache.window(slots_RW, columns_S, at_RW=at_RW)
        return at_least_float32(self.logits(self._layers(x_RWD, window, inject_KRWD)))

    def _layers(self, x_RWD: Tensor, window: Window, inject_KRWD: Tensor | None) -> Tensor:
        return self.norm(self._blocks(x_RWD, window, inject_KRWD))

    def _blocks(self, x_RWD: Tensor, window: Window, inject_KRWD: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            if inject_KRWD is not None:
                for k, place in enumerate(self.config.inject_layers):
                    if place == index:
                        x_RWD = x_RWD + inject_KRWD[k].to(x_RWD.dtype)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_RWD = checkpoint(layer, x_RWD, window, self.attention_backend, use_reentrant=False)
            else:
                x_RWD = layer(x_RWD, window, self.attention_backend)
        return x_RWD

    def logits(self, h_RWD: Tensor) -> Tensor:
        """logits_RWV; with a tied codebook head(h) + scale * (P h) . codebook."""
        logits_RWV = self.output(h_RWD)
        if self.config.codebook_dim is not None:
            vectors_RWC = (self.codebook_scale * self.codebook_out(h_RWD)).to(logits_RWV.dtype)
            logits_RWV.flatten(0, 1).addmm_(vectors_RWC.flatten(0, 1), self.codebook.t().to(logits_RWV.dtype))
        return logits_RWV

    def forward(self, codes_BL: Tensor, condition: Condition, grid: tuple[int, int], inject_KBLD: Tensor | None = None,
                mask_BSS: Tensor | None = None) -> Tensor:
        """Teacher-forced logits_BLV: [prefix, codes 0 .. L-2] in one differentiable pass; output j predicts code j.

        `mask_BSS` (bool, S = P+L-1) replaces the causal rule minus padded caption slots.
        """
        slots_S = torch.arange(self.prefix_length + codes_BL.shape[1] - 1, device=codes_BL.device)
        slots_BS = slots_S.expand(codes_BL.shape[0], -1)
        tokens_BWD = self.embed(codes_BL[:, :-1], slots_BS[:, self.prefix_length:])
        x_BSD = torch.cat([self.prefix(condition), tokens_BWD], dim=1)
        if inject_KBLD is not None:     # row j belongs to the slot that predicts code j
            inject_KBLD = F.pad(inject_KBLD, (0, 0, self.prefix_length - 1, 0))
        cache = self.new_cache(codes_BL.shape[0], slots_S.shape[0], grid, condition.caption_mask_BP, store=False)
        h_BSD = self.step(x_BSD, slots_BS, cache, inject_KBLD, mask_BSS)
        return self.logits(h_BSD[:, self.prefix_length - 1:])
