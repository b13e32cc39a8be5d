"""Size tables of the published models as data. No torch here: the command line lists them at start-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LLAMAGEN_PAPER = "Sun et al. 2024, arXiv:2406.06525"
CONTROLAR_PAPER = "Li et al. 2024, arXiv:2410.02705"
VAR_PAPER = "Tian et al. 2024, arXiv:2404.02905"
MAR_PAPER = "Li et al. 2024, arXiv:2406.11838"
DISTILLED_PAPER = "Liu et al. 2024, arXiv:2412.17153"


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
VAR = Family("FoundationVision/var", "github.com/FoundationVision/VAR", "MIT", VAR_PAPER)
MAR = Family("github.com/LTH14/mar", "github.com/LTH14/mar", "MIT", MAR_PAPER)
LATENT_DIFFUSION = Family("stabilityai/sd-vae-ft-mse", "github.com/CompVis/latent-diffusion", "MIT",
                          "Rombach et al. 2022, arXiv:2112.10752")
DISTILLED = Family("microsoft/distilled_decoding", "github.com/microsoft/distilled_decoding", "MIT", DISTILLED_PAPER)


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


# Sides of the scales of VAR's tokenizer by pixels; there are no published transformers for 1024.
VAR_SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


def square_scales(sides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(h, w) of square scales, the release's `patch_nums`."""
    return tuple((side, side) for side in sides)


@dataclass(frozen=True)
class VARPreset:
    """One size of VAR's transformer (paper, table 2): width 64 * depth, as many heads as layers. Codebook 4096 x 32."""

    depth: int
    sides: tuple[int, ...] = VAR_SIDES[256]
    shared_adaln: bool = False
    gamma_init: float = 1e-3                                        # from the published training commands
    family: Family = VAR

    @property
    def heads(self) -> int:
        """Of 64 channels each."""
        return self.depth

    @property
    def drop_path(self) -> float:
        """Rate of the last block."""
        return 0.1 * self.depth / 24

    def config(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for VARConfig, `changes` included."""
        return {"layers": self.depth, "heads": self.depth, "dim": 64 * self.depth, "drop_path": self.drop_path,
                "scales": square_scales(self.sides), "shared_adaln": self.shared_adaln,
                "gamma_init": self.gamma_init, **changes}


VAR_PRESETS = {
    "d16": VARPreset(16),
    "d20": VARPreset(20),
    "d24": VARPreset(24, gamma_init=1e-4),
    "d30": VARPreset(30, gamma_init=1e-5),
    "d36": VARPreset(36, sides=VAR_SIDES[512], shared_adaln=True, gamma_init=5e-6),
}


# (layers, dim) of a teacher -> the passes of its published student: after so many clean tokens or scales; from `split`
# on tokens are left as latents.
STUDENT_PASSES: dict[tuple[int, int], dict[str, Any]] = {
    (12, 768): {"timesteps": (0, 80), "split": 80}, (24, 1024): {"timesteps": (0, 80), "split": 130},
    (16, 1024): {"timesteps": (0, 5), "split": 5}, (20, 1280): {"timesteps": (0, 4), "split": 4},
    (24, 1536): {"timesteps": (0, 4), "split": 4},
}


@dataclass(frozen=True)
class MARPreset:
    """One size of MAR (paper, table 4; heads and buffer from the code): encoder and decoder are alike."""

    layers: int             # of each
    heads: int
    dim: int
    head_layers: int
    head_width: int
    cfg: float              # of the published evaluation: 256 steps, linear guidance
    family: Family = MAR

    def config(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for MARConfig (a dict for `head`), `changes` included."""
        sides = {f"{part}_{name}": getattr(self, name) for part in ("encoder", "decoder")
                 for name in ("layers", "heads", "dim")}
        return {**sides, "head": {"layers": self.head_layers, "width": self.head_width}, **changes}


@dataclass(frozen=True)
class KLPreset:
    """One KL autoencoder: base width 128, two blocks per level."""

    multipliers: tuple[int, ...]
    latent_channels: int
    attention_levels: tuple[int, ...]
    patch_size: int
    scale: float
    family: Family

    def config(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for KLConfig, `changes` included."""
        names = ("multipliers", "latent_channels", "attention_levels", "patch_size", "scale")
        return {**{name: getattr(self, name) for name in names}, **changes}


KL_PRESETS = {      # both make 16 x 16 tokens of 16 numbers of 256 pixels
    "KL-16": KLPreset((1, 1, 2, 2, 4), 16, attention_levels=(4,), patch_size=1, scale=0.2325, family=MAR),
    "KL-8": KLPreset((1, 2, 4, 4), 4, attention_levels=(), patch_size=2, scale=0.18215, family=LATENT_DIFFUSION),
}
MAR_PRESETS = {
    "B": MARPreset(layers=12, heads=12, dim=768, head_layers=6, head_width=1024, cfg=2.9),
    "L": MARPreset(layers=16, heads=16, dim=1024, head_layers=8, head_width=1280, cfg=3.0),
    "H": MARPreset(layers=20, heads=16, dim=1280, head_layers=12, head_width=1536, cfg=3.2),
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
