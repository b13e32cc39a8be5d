"""Size tables of the published models as data. No torch here: the command line lists them at start-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMAGEN_PAPER = "Sun et al. 2024, arXiv:2406.06525"
CONTROLAR_PAPER = "Li et al. 2024, arXiv:2410.02705"


@dataclass(frozen=True)
class Family:
    """Where a group of models comes from."""

    source: str     # hub id of the weights
    code: str       # repository
    licence: str
    paper: str


LLAMAGEN = Family("FoundationVision/LlamaGen", "github.com/FoundationVision/LlamaGen", "MIT", LLAMAGEN_PAPER)
LLAMAGEN_T2I = Family("peizesun/llamagen_t2i", "github.com/FoundationVision/LlamaGen", "MIT", LLAMAGEN_PAPER)
CONTROLAR = Family("wondervictor/ControlAR", "github.com/hustvl/ControlAR", "Apache-2.0", CONTROLAR_PAPER)


@dataclass(frozen=True)
class ARPreset:
    """One size of the LlamaGen transformer (paper, table 1; 1B and 7B from the code). Vocabulary 16384."""

    layers: int
    heads: int
    dim: int
    ffn_hidden: int
    family: Family = LLAMAGEN

    def config(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for ARConfig, `changes` included."""
        return {"layers": self.layers, "heads": self.heads, "dim": self.dim, "ffn_hidden": self.ffn_hidden, **changes}


@dataclass(frozen=True)
class VQPreset:
    """One LlamaGen tokenizer: codebook 16384 x 8, base width 128."""

    multipliers: tuple[int, ...]
    stride: int
    family: Family = LLAMAGEN

    def config(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for VQConfig, `changes` included."""
        return {"multipliers": self.multipliers, **changes}


AR_PRESETS = {
    "B": ARPreset(layers=12, heads=12, dim=768, ffn_hidden=2048),
    "L": ARPreset(layers=24, heads=16, dim=1024, ffn_hidden=2816),
    "XL": ARPreset(layers=36, heads=20, dim=1280, ffn_hidden=3584),
    "XXL": ARPreset(layers=48, heads=24, dim=1536, ffn_hidden=4096),
    "XXXL": ARPreset(layers=48, heads=40, dim=2560, ffn_hidden=6912),
    "1B": ARPreset(layers=22, heads=32, dim=2048, ffn_hidden=5632),
    "3B": ARPreset(layers=24, heads=32, dim=3200, ffn_hidden=8704),
    "7B": ARPreset(layers=32, heads=32, dim=4096, ffn_hidden=11008),
}
VQ_PRESETS = {
    "VQ-16": VQPreset(multipliers=(1, 1, 2, 2, 4), stride=16),
    "VQ-8": VQPreset(multipliers=(1, 2, 2, 4), stride=8),
}


@dataclass(frozen=True)
class Published:
    """One published transformer file. Its weights do not tell `block_size`, the cells of its square rotary table."""

    file: str
    preset: str
    conditioning: str       # class | text
    block_size: int
    tokenizer: str          # tokenizer file of the same family
    family: Family


PUBLISHED = (
    Published("c2i_B_256.pt", "B", "class", 256, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("c2i_B_384.pt", "B", "class", 576, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("c2i_L_256.pt", "L", "class", 256, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("c2i_L_384.pt", "L", "class", 576, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("c2i_XL_384.pt", "XL", "class", 576, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("c2i_XXL_384.pt", "XXL", "class", 576, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("c2i_3B_384.pt", "3B", "class", 576, "vq_ds16_c2i.pt", LLAMAGEN),
    Published("t2i_XL_stage1_256.pt", "XL", "text", 256, "vq_ds16_t2i.pt", LLAMAGEN_T2I),
    Published("t2i_XL_stage2_512.pt", "XL", "text", 1024, "vq_ds16_t2i.pt", LLAMAGEN_T2I),
    Published("hed.safetensors", "XL", "text", 1024, "vq_ds16_t2i.pt", CONTROLAR),
    Published("seg_cocostuff.safetensors", "XL", "text", 1024, "vq_ds16_t2i.pt", CONTROLAR),
    Published("canny_MR.safetensors", "XL", "text", 2304, "vq_ds16_t2i.pt", CONTROLAR),
    Published("depth_MR.safetensors", "XL", "text", 2304, "vq_ds16_t2i.pt", CONTROLAR),
)
