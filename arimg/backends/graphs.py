"""The networks as graphs: one pass of the transformer, head included, and the decoder of a tokenizer.

Where a runtime can (`Ops.in_place`), a pass writes its keys and values into the cache and reads them there, so that
every sum over slots has one order, however many positions a pass has. Elsewhere it reads those of earlier passes where
they lie and hands back its own, which the host writes (cache.py); attention is then over two parts, the past and the
pass itself, whose scores share one softmax, so that no pass copies the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from arimg.backends.ops import Array, InPlaceOps, Ops, Value
from arimg.models.ar import ARTransformer, Block
from arimg.tokenizers.convnet import AttnBlock, Level, ResBlock
from arimg.tokenizers.vq import VQTokenizer


def array(tensor: Tensor) -> Array:
    """float32."""
    values: Array = tensor.detach().float().cpu().numpy()
    return values


def step_graph(ops: Ops, network: ARTransformer) -> None:
    """Inputs x_RWD, cos_RWF and sin_RWF, bias (0, or very negative where unseen), per layer key_i and value_i, inject_k
    (R, W, D). Outputs logits_RWV. By `ops.in_place`:

    - keys and values are (R, 1, G, S, E), so are outputs new_key_i and new_value_i in the same memory; where_RWG4 says
      at which (r, 0, g, slot) the pass writes. bias is (R, W, 1, 1, S)
    - keys and values are (R, G, S, E), and output fresh (2 * layers * R, G, W, E) has those of the pass, the keys of
      layer 0 first. bias is (R, 1, W, S + W), cut = (S, W)
    """
    config = network.config
    x_RWD = ops.input("x", (-1, -1, config.dim))
    turn = [ops.input(name, (-1, -1, config.head_dim // 2)) for name in ("cos", "sin")]
    groups, width = config.key_heads, config.head_dim
    attend: Callable[..., tuple[Value, list[Value]]]
    attend = _attention_in_place if ops.in_place else _attention_in_two_parts
    store = (-1, 1, groups, -1, width) if ops.in_place else (-1, groups, -1, width)
    if ops.in_place:
        bias, places = ops.input("bias", (-1, -1, 1, 1, -1)), ops.input("where", (-1, -1, groups, 4), integer=True)
    else:
        bias, places = ops.input("bias", (-1, 1, -1, -1)), ops.input("cut", (2,), integer=True)
    injects = [ops.input(f"inject_{k}", (-1, -1, config.dim)) for k in range(network.inject_points)]
    fresh: list[Value] = []
    for index, block in enumerate(network.layers):
        assert isinstance(block, Block)
        for k, place in enumerate(config.inject_layers):
            if place == index:
                x_RWD = ops.add(x_RWD, injects[k])
        names = [f"{name}_{index}" for name in ("key", "value")]
        past = [ops.input(name, store) for name in names]
        normed = ops.rms_norm(x_RWD, array(block.attention_norm.weight), config.norm_eps)
        out, own = attend(ops, block, _heads(ops, block, normed, turn), past, bias, places)
        if ops.in_place:
            for name, value in zip(names, own):
                ops.output(f"new_{name}", value)
        else:
            fresh += own
        x_RWD = ops.add(x_RWD, ops.linear(out, array(block.attention.wo.weight)))
        x_RWD = ops.add(x_RWD, _feed_forward(ops, block, x_RWD, config.norm_eps, config.ffn_hidden))
    if not ops.in_place:
        ops.output("fresh", ops.concat(fresh, 0))
    normed = ops.rms_norm(x_RWD, array(network.norm.weight), config.norm_eps)
    ops.output("logits", ops.linear(normed, array(head_weight(network)), fine=True))


def _heads(ops: Ops, block: Block, x_RWD: Value, turn: list[Value]) -> list[Value]:
    """Queries, keys and values, (R, W, heads * E)."""
    attention = block.attention
    queries, groups, width = attention.heads, attention.kv_heads, attention.head_dim
    qk, values = ops.split(ops.linear(x_RWD, _projection(block)), ((queries + groups) * width, groups * width), 2)
    cos, sin = turn
    turned = ops.rotate(qk, cos, sin, queries + groups)
    return [*ops.split(turned, (queries * width, groups * width), 2), values]


def _attention_in_place(ops: Ops, block: Block, heads: list[Value], past: list[Value], bias: Value,
                        where: Value) -> tuple[Value, list[Value]]:
    """out (R, W, D), keys and values. Each position is a product of its own, of the H queries of a key head with all
    slots, so that the order of its sums does not depend on W."""
    attention = block.attention
    groups, width = attention.kv_heads, attention.head_dim
    q_RWGHE = ops.reshape(heads[0], (0, 0, groups, -1, width))
    put = cast(InPlaceOps, ops).put
    keys, values = (put(old, where, ops.reshape(new, (0, 0, groups, width))) for old, new in zip(past, heads[1:]))
    weights_RWGHS = ops.softmax(ops.add(ops.matmul(q_RWGHE, keys, transpose_b=True), bias))
    return ops.reshape(ops.matmul(weights_RWGHS, values), (0, 0, -1)), [keys, values]


def _attention_in_two_parts(ops: Ops, block: Block, heads: list[Value], past: list[Value], bias: Value,
                            cut: Value) -> tuple[Value, list[Value]]:
    """out (R, W, D), and the pass's own keys and values (R, G, W, E). The H queries of a key head are rows of one
    product."""
    attention = block.attention
    queries, groups, width = attention.heads, attention.kv_heads, attention.head_dim
    shared = queries // groups      # H
    q, *own = (ops.transpose(ops.reshape(one, (0, 0, -1, width)), (0, 2, 1, 3)) for one in heads)
    if shared > 1:
        q, bias = ops.reshape(q, (0, groups, -1, width)), ops.concat([bias] * shared, 2)
    scores = ops.concat([ops.matmul(q, keys, transpose_b=True) for keys in (past[0], own[0])], -1)
    before, now = ops.split(ops.softmax(ops.add(scores, bias)), cut, 3)
    out = ops.add(ops.matmul(before, past[1]), ops.matmul(now, own[1]))
    if shared > 1:
        out = ops.reshape(out, (0, queries, -1, width))
    return ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (0, 0, queries * width)), own


def _projection(block: Block) -> Array:
    """The fused projection with the pairs of queries and keys laid out as halves, (2i, 2i+1) -> (i, E/2 + i), and the
    queries divided by sqrt(E)."""
    attention = block.attention
    weight_NED = attention.wqkv.weight.detach().float().unflatten(0, (-1, attention.head_dim))
    turned = attention.heads + attention.kv_heads
    halves_NED = torch.cat([weight_NED[:turned, 0::2], weight_NED[:turned, 1::2]], dim=1)
    halves_NED[:attention.heads] *= attention.head_dim ** -0.5
    return array(torch.cat([halves_NED, weight_NED[turned:]]).flatten(0, 1))


def _feed_forward(ops: Ops, block: Block, x_RWD: Value, eps: float, hidden: int) -> Value:
    ffn = block.feed_forward
    both = np.concatenate([array(ffn.w1.weight), array(ffn.w3.weight)])
    gate, up = ops.split(ops.linear(ops.rms_norm(x_RWD, array(block.ffn_norm.weight), eps), both), (hidden, hidden), 2)
    return ops.linear(ops.multiply(ops.silu(gate), up), array(ffn.w2.weight))


def head_weight(network: ARTransformer) -> Tensor:
    """(V, D): head, plus scale * codebook P where it is tied to a codebook."""
    weight_VD = network.output.weight.detach().float()
    if network.config.codebook_dim is not None:
        tied_VD = network.codebook.float() @ network.codebook_out.weight.detach().float()
        weight_VD = weight_VD + network.codebook_scale.detach().float() * tied_VD
    return weight_VD


def decoder_graph(ops: Ops, tokenizer: VQTokenizer) -> None:
    """Input latents_BChw, output images_B3HW."""
    decoder = tokenizer.decoder
    h = _conv(ops, ops.input("latents", (-1, tokenizer.config.codebook_dim, -1, -1)), tokenizer.post_quant_conv)
    h = _conv(ops, h, decoder.conv_in)
    for part in (*decoder.mid, *decoder.conv_blocks):
        h = _level(ops, h, part) if isinstance(part, Level) else _block(ops, h, part)
    h = _conv(ops, ops.silu(_norm(ops, h, decoder.norm_out)), decoder.conv_out)
    if tokenizer.config.patch_size > 1:
        h = ops.pixel_shuffle(h, tokenizer.config.patch_size)
    ops.output("images", h)


def _level(ops: Ops, h: Value, level: Level) -> Value:
    for index, block in enumerate(level.res):
        h = _block(ops, h, block)
        if len(level.attn):
            h = _block(ops, h, level.attn[index])
    upsample: Any = getattr(level, "upsample", None)
    if upsample is not None:
        h = _conv(ops, ops.upsample(h), upsample.conv)
    return h


def _block(ops: Ops, x_BCHW: Value, block: nn.Module) -> Value:
    if isinstance(block, AttnBlock):
        return _pixel_attention(ops, x_BCHW, block)
    assert isinstance(block, ResBlock), type(block)
    h = _conv(ops, ops.silu(_norm(ops, x_BCHW, block.norm1)), block.conv1)
    h = _conv(ops, ops.silu(_norm(ops, h, block.norm2)), block.conv2)
    return ops.add(h, _conv(ops, x_BCHW, block.nin_shortcut) if hasattr(block, "nin_shortcut") else x_BCHW)


def _pixel_attention(ops: Ops, x_BCHW: Value, block: AttnBlock) -> Value:
    h = _norm(ops, x_BCHW, block.norm)
    channels = block.q.out_channels
    q_BCN, k_BCN, v_BCN = (ops.reshape(_conv(ops, h, layer), (0, 0, -1)) for layer in (block.q, block.k, block.v))
    scale = ops.constant(np.array([channels ** -0.5], np.float32))
    weights = ops.softmax(ops.multiply(ops.matmul(ops.transpose(q_BCN, (0, 2, 1)), k_BCN), scale))
    out_BCN = ops.transpose(ops.matmul(weights, ops.transpose(v_BCN, (0, 2, 1))), (0, 2, 1))
    return ops.add(x_BCHW, _conv(ops, ops.like(out_BCN, x_BCHW), block.proj_out))


def _conv(ops: Ops, x: Value, conv: nn.Conv2d) -> Value:
    assert conv.bias is not None and conv.stride == (1, 1) and conv.padding[0] == conv.kernel_size[0] // 2
    return ops.conv(x, array(conv.weight), array(conv.bias))


def _norm(ops: Ops, x: Value, norm: nn.GroupNorm) -> Value:
    return ops.group_norm(x, norm.num_groups, array(norm.weight), array(norm.bias), norm.eps)


def new_ops(runtime: str, weights: str = "float32") -> Any:
    """Of a runtime that `check_runtime` let through."""
    if runtime == "onnx":
        from arimg.backends.onnx_ops import OnnxOps
        return OnnxOps(weights)
    from arimg.backends.openvino_ops import OpenvinoOps
    return OpenvinoOps(weights)
