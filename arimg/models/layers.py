"""Blocks shared by the transformers: norms, 2D rotary positions, the attention facade, the key-value caches.

Letters: R rows; W positions of a pass; S slots; H query heads; G key heads; E channels per head; F = E/2 rotary pairs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import UnknownNameError
from arimg.kernels import build_error
from arimg.kernels.attention import exact_attention

log = logging.getLogger("arimg")

EXTENT_STEP = 64    # passes read the cache in multiples of this many slots, so compiled kernels see few shapes


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, times weight (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        if x.dtype == self.weight.dtype and at_least_float32(x) is x:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(at_least_float32(x), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (Shazeer 2020).

    `merge` replaces w1 and w3 by one layer `w13`, for networks that are never saved again.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.w13: nn.Module | None = None

    def merge(self) -> None:
        """Make one product of two."""
        with torch.device("meta"):
            self.w13 = nn.Linear(self.w1.in_features, 2 * self.w1.out_features, bias=False)
        self.w13.weight = nn.Parameter(torch.cat([self.w1.weight, self.w3.weight]), requires_grad=False)
        del self.w1, self.w3

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        gate, up = (self.w1(x), self.w3(x)) if self.w13 is None else self.w13(x).chunk(2, dim=-1)
        in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        return self.dropout(self.w2(F.silu(gate, inplace=in_place) * up))


class MLP(nn.Module):
    """fc2(gelu(fc1 x)), tanh-GELU, without biases."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def rotary_table_2d(cells_N: Tensor, width: int, head_dim: int, base: float, prefix: int, identity: bool) -> Tensor:
    """table_SF2, last axis (cos, sin), float32, S = prefix + N: LlamaGen's two-dimensional rotary embedding.

    Cell n lies in row n // width and column n % width. The first half of the pairs turns by row * theta_j, the second
    by column * theta_j, theta_j = base^(-2j/half), half = head_dim / 2. Prefix rows are the identity rotation (cos 1),
    or all zero as in the released models, whose prefix queries and keys vanish.
    """
    half = head_dim // 2
    theta = 1.0 / base ** (torch.arange(0, half, 2, device=cells_N.device).float() / half)
    rows_N, columns_N = cells_N // width, cells_N % width
    angles_NF = torch.cat([torch.outer(rows_N.float(), theta), torch.outer(columns_N.float(), theta)], dim=-1)
    table_NF2 = torch.stack([angles_NF.cos(), angles_NF.sin()], dim=-1)
    first_PF2 = torch.zeros(prefix, half, 2, device=cells_N.device)
    if identity:
        first_PF2[..., 0] = 1
    return torch.cat([first_PF2, table_NF2])


def rotate(x_RWHE: Tensor, table_RWF2: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs (2i, 2i+1) by the angles of the table, in float32 (Su et al. 2021)."""
    pairs_RWHF2, table_RW1F2 = at_least_float32(x_RWHE).unflatten(-1, (-1, 2)), table_RWF2[:, :, None]
    if torch.compiler.is_compiling():       # which makes one kernel of this; of complex numbers it makes none
        (a, b), (cos, sin) = pairs_RWHF2.unbind(-1), table_RW1F2.unbind(-1)
        turned_RWHF2 = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned_RWHF2 = torch.view_as_real(torch.view_as_complex(pairs_RWHF2) * torch.view_as_complex(table_RW1F2))
    return turned_RWHF2.flatten(-2).to(x_RWHE.dtype)


@dataclass(frozen=True)
class Window:
    """What one pass needs besides its input: where it reads and writes, and what each position sees."""

    cache: Cache | SequenceCache
    slots_RW: Tensor
    table_RWF2: Tensor              # rotary
    mask_R1WS: Tensor | None        # None = plain causal over the pass itself

    def exchange(self, layer: int, keys_RWGE: Tensor, values_RWGE: Tensor) -> tuple[Tensor, Tensor]:
        """Hand over this pass's keys and values; get all that the pass may read, (R, G, S, E)."""
        return self.cache.exchange(layer, self, keys_RWGE, values_RWGE)


@dataclass
class Cache:
    """Keys and values by slot. A later write to a slot replaces the earlier one, so nothing is ever rolled back.

    A pass of fewer rows than the cache holds reads and writes the first rows. `reach` bounds the written slots from
    above and is kept on the host, so that no pass reads the unwritten tail and none waits for the device: slots are
    filled without gaps, a pass of W positions adds W slots at most, unless `limit` has said more.

    Slots beyond the rotary table are scratch: leaves of a tree are written there (`at_RW` of `open`).
    """

    rope_SF2: Tensor
    real_RS: Tensor                 # bool, False on padded caption slots
    readable_RS: Tensor             # bool, written and real
    keys: list[Tensor]              # per layer (R, G, S, E)
    values: list[Tensor]
    extent_step: int = EXTENT_STEP
    reach: int = 0
    stop: int | None = None

    def limit(self, stop: int) -> None:
        """The host's promise for the passes to come: none reads or writes a slot at or beyond `stop`, scratch apart."""
        self.stop = stop

    def open(self, slots_RW: Tensor, mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Window:
        """Begin a pass at these slots. A query at slot s sees itself and every readable slot <= s; `mask_RWW` replaces
        that rule among the positions of the pass. `at_RW` gives the slots whose positions the entries take, where those
        written to scratch slots have other ones: they see what slot `at` would, and nothing sees them."""
        anywhere = at_RW is not None or mask_RWW is not None and self.stop is None
        return self.window(slots_RW, self.advance(slots_RW, anywhere), mask_RWW, at_RW)

    def advance(self, slots_RW: Tensor, anywhere: bool) -> Tensor:
        """The part of `open` that is the host's: columns_S, the slots that a pass at these may read; `anywhere`: all
        of them."""
        if anywhere:
            self.reach = self.real_RS.shape[1]
        else:
            self.reach = self.reach + slots_RW.shape[1] if self.stop is None else self.stop
        extent = min(-(-self.reach // self.extent_step) * self.extent_step, self.real_RS.shape[1])
        return torch.arange(extent, device=slots_RW.device)

    def window(self, slots_RW: Tensor, columns_S: Tensor, mask_RWW: Tensor | None = None,
               at_RW: Tensor | None = None) -> Window:
        """The rest of `open`, without a look at anything but tensors."""
        rows, width = slots_RW.shape
        at_RW = slots_RW if at_RW is None else at_RW
        self.readable_RS[:rows].scatter_(1, slots_RW, self.real_RS[:rows].gather(1, slots_RW))
        before_RWS = columns_S < at_RW[..., None]
        readable_R1S = self.readable_RS[:rows, None, :len(columns_S)]
        mask_RWS = readable_R1S & before_RWS | (columns_S == slots_RW[..., None])
        if mask_RWW is not None:
            mask_RWS.scatter_(2, slots_RW[:, None].expand(-1, width, -1), mask_RWW)
        return Window(self, slots_RW, self.rope_SF2[at_RW], mask_RWS[:, None])

    def exchange(self, layer: int, window: Window, keys_RWGE: Tensor, values_RWGE: Tensor) -> tuple[Tensor, Tensor]:
        """Write by slot, return the slots that the pass reads."""
        rows = window.slots_RW.shape[0]
        where = (torch.arange(rows, device=window.slots_RW.device)[:, None], window.slots_RW)
        for store, new in ((self.keys[layer], keys_RWGE), (self.values[layer], values_RWGE)):
            store.transpose(1, 2).index_put_(where, new.to(store.dtype))
        assert window.mask_R1WS is not None
        extent = window.mask_R1WS.shape[-1]
        return self.keys[layer][:rows, :, :extent], self.values[layer][:rows, :, :extent]


@dataclass(frozen=True)
class SequenceCache:
    """The cache that stores nothing: for one differentiable pass over the slots 0 .. W-1, all of them, in order."""

    rope_SF2: Tensor
    real_RS: Tensor | None = None   # bool, False on padded caption slots; None = all real

    def open(self, slots_RW: Tensor, mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Window:
        """Begin the pass; `at_RW` is None, as there are no scratch slots. Plain causal, minus padded slots, plus the
        diagonal; `mask_RWW` replaces that rule."""
        assert at_RW is None
        width = slots_RW.shape[1]
        if mask_RWW is None and self.real_RS is not None:
            causal_WW = torch.ones(width, width, dtype=torch.bool, device=slots_RW.device).tril()
            diagonal_WW = torch.eye(width, dtype=torch.bool, device=slots_RW.device)
            mask_RWW = causal_WW & self.real_RS[:, None, :width] | diagonal_WW
        mask_R1WW = None if mask_RWW is None else mask_RWW[:, None]
        return Window(self, slots_RW, self.rope_SF2[None, :width], mask_R1WW)

    def exchange(self, layer: int, window: Window, keys_RWGE: Tensor, values_RWGE: Tensor) -> tuple[Tensor, Tensor]:
        """The pass reads its own keys and values."""
        return keys_RWGE.transpose(1, 2), values_RWGE.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with a fused projection laid out [q | k | v]."""

    def __init__(self, layer: int, dim: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, heads, kv_heads, dim // heads
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RWD: Tensor, window: Window, backend: str) -> Tensor:
        """(R, W, D)."""
        qkv_RWNE = self.wqkv(x_RWD).unflatten(-1, (-1, self.head_dim))
        qk_RWNE, v_RWGE = qkv_RWNE.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q_RWHE, k_RWGE = rotate(qk_RWNE, window.table_RWF2).split([self.heads, self.kv_heads], dim=2)
        k_RGSE, v_RGSE = window.exchange(self.layer, k_RWGE, v_RWGE)
        mask_R1WS = window.mask_R1WS
        out_RHWE = attention(q_RWHE.transpose(1, 2), k_RGSE, v_RGSE, mask_R1WS, mask_R1WS is None, backend)
        return self.dropout(self.wo(out_RHWE.transpose(1, 2).flatten(-2)))


def attention(q_RHWE: Tensor, k_RGSE: Tensor, v_RGSE: Tensor, mask: Tensor | None = None, causal: bool = False,
              backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(E)) v -> (R, H, W, E) of q's dtype; query head h reads key head h // (H/G).

    `mask` is bool, True = visible, broadcastable to (R, 1, W, S); `causal` needs W == S. `backend` is one of sdpa (the
    reference), exact (kernels/attention.py), math, flex, xformers; one that cannot run here is replaced by sdpa with
    one warning per reason. Raises UnknownNameError.
    """
    if backend not in _BACKENDS:
        raise UnknownNameError("attention backend", backend, _BACKENDS)
    if reason := _obstacle(backend, q_RHWE):
        _warn_once(backend, reason)
        backend = "sdpa"
    if backend == "exact":
        return _exact(q_RHWE, k_RGSE, v_RGSE, mask, causal)
    groups = q_RHWE.shape[1] // k_RGSE.shape[1]
    if groups > 1:
        k_RGSE, v_RGSE = k_RGSE.repeat_interleave(groups, dim=1), v_RGSE.repeat_interleave(groups, dim=1)
    return _BACKENDS[backend](q_RHWE.to(k_RGSE.dtype), k_RGSE, v_RGSE, mask, causal).to(q_RHWE.dtype)


def _obstacle(backend: str, q: Tensor) -> str | None:
    """Why `backend` cannot run on these tensors; None when it can."""
    if backend in ("sdpa", "math"):
        return None
    if backend == "exact":
        return None if torch.compiler.is_compiling() else _obstacle_to_exact(q)
    if q.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "it has no float64 kernels"
    if backend == "xformers" and find_spec("xformers") is None:
        return "xformers is not installed; type: pip install 'arimg[xformers]'"
    return None


def _obstacle_to_exact(q: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"it is made for CPUs, the tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "it computes in float32"
    if torch.is_grad_enabled() and q.requires_grad:
        return "it has no gradient"
    return build_error("attention")


@cache
def _warn_once(backend: str, reason: str) -> None:
    log.warning("attention backend %s: %s; using sdpa", backend, reason)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        return _math(q, k, v, mask, causal)     # the fused kernel's backward pass takes twice as long (docs/bench.md)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if causal else mask


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    visible = _visible(q, k, mask, causal)
    if visible is not None:
        scores = scores + torch.zeros_like(visible, dtype=scores.dtype).masked_fill(~visible, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()   # divided by their sum last, once per channel
    return (weights @ v / weights.sum(-1, keepdim=True)).to(q.dtype)


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    visible = mask if causal or mask is not None else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    return exact_attention(q, k, v, visible).to(q.dtype)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    visible = _visible(q, k, mask, causal)
    if visible is None:
        return _compiled_flex()(q, k, v)
    visible = visible.expand(q.shape[0], 1, q.shape[2], k.shape[2])

    def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(visible[row, 0, query, key], score, float("-inf"))
    return _compiled_flex()(q, k, v, score_mod=score_mod)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention
    visible = _visible(q, k, mask, causal)
    bias = None
    if visible is not None:
        bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, float("-inf"))
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=bias)
    return out.transpose(1, 2)


_BACKENDS = {"sdpa": _sdpa, "exact": _exact, "math": _math, "flex": _flex, "xformers": _xformers}
