"""The autoregressive transformer with its layers on another runtime: a Backbone, so that every decoder serves it.

Embeddings are looked up here; layers, final norm and head are one graph (graphs.step_graph), so `step` returns logits
already and `logits` hands them through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arimg.backends.cache import SlotCache, new_slot_cache
from arimg.backends.host import Exported
from arimg.models.ar import ARConfig, CaptionEmbedding, ClassEmbedding, rotary_table
from arimg.models.base import Condition


class ExportedTransformer(Exported):
    """See models/base.py for the contract; subclasses name the runtime."""

    graph_name = "step"

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.prefix_length = config.prefix_length
        self.inject_points = len(config.inject_layers)
        embedding = ClassEmbedding if config.conditioning == "class" else CaptionEmbedding
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)       # a tied codebook's part included

    def null(self, condition: Condition) -> Condition:
        """The unconditional twin."""
        return self.cls_embedding.drop(condition, torch.ones(condition.rows, dtype=torch.bool))

    def new_cache(self, rows: int, length: int, grid: tuple[int, int], prefix_mask_RP: Tensor | None = None,
                  store: bool = True, scratch: int = 0) -> SlotCache:
        """See Backbone; gradients there are none. Raises InputError when the grid is too large."""
        assert store, "an exported network is not trained"
        config = self.config
        rope_SF2 = rotary_table(config, grid)[:length]
        return new_slot_cache(rope_SF2, config.layers, rows, config.key_heads, config.head_dim, scratch,
                              prefix_mask_RP)

    def prefix(self, condition: Condition) -> Tensor:
        """x_RPD."""
        return self.cls_embedding(condition)

    def embed(self, codes_RW: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD."""
        return self.tok_embeddings(codes_RW)

    @torch.no_grad()
    def step(self, x_RWD: Tensor, slots_RW: Tensor, cache: SlotCache, inject_KRWD: Tensor | None = None,
             mask_RWW: Tensor | None = None, at_RW: Tensor | None = None) -> Tensor:
        """logits_RWV; see Backbone.step."""
        rows, width = slots_RW.shape
        one = cache.open(slots_RW, mask_RWW, at_RW)
        past = one.past_NRGSE
        inputs = {"x": x_RWD, "cos": one.turn_RWF2[..., 0], "sin": one.turn_RWF2[..., 1], "bias": one.bias_R1WN,
                  "cut": torch.tensor([past.shape[3], width])}
        if inject_KRWD is None:
            inject_KRWD = x_RWD.new_zeros(self.inject_points, 1, 1, 1).expand(-1, rows, width, self.config.dim)
        inputs |= {f"inject_{k}": inject_KRWD[k].float() for k in range(self.inject_points)}
        for layer in range(self.config.layers):
            inputs |= {f"key_{layer}": past[2 * layer], f"value_{layer}": past[2 * layer + 1]}
        fresh, logits = self.run({name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()})
        cache.write(slots_RW, torch.from_numpy(fresh))
        return torch.from_numpy(logits)

    def logits(self, h_RWV: Tensor) -> Tensor:
        """What `step` returned."""
        return h_RWV


class OnnxTransformer(ExportedTransformer):
    """On ONNX Runtime."""

    runtime = "onnx"


class OpenvinoTransformer(ExportedTransformer):
    """On OpenVINO."""

    runtime = "openvino"
