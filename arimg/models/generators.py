"""The networks of Distilled Decoding 2 (Liu et al. 2025, arXiv:2510.21003, section 3.2): a teacher's backbone without
its classification head, and a small MLP head that turns a noised token, its time and its feature into a velocity.

Generator and guidance network are of this one kind. The generator's backbone reads noise and its head the same noise at
t = 1, so that q = eps - v is a one-step sample; the guidance network's backbone reads generated tokens and its head
noised ones. Both read shifted, as the teacher does: the feature of token j depends on tokens before j alone.

Letters: B images; L tokens; C latent channels; D width; P prefix slots; F tokens of the first unit (1 of a raster, all
of the first scale); N = L - F cells that the slots after the prefix read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition, Order
from arimg.models.diffusion_head import HeadMLP
from arimg.models.layers import MLP
from arimg.models.students import LatentTransformer
from arimg.models.var import VARConfig, VARTransformer


class _Generator(nn.Module):
    """What both kinds share. `backbone` keeps the teacher's slots, cache and places of control."""

    config: Any
    backbone: Any
    head: HeadMLP
    latent_dim: int
    first: int                          # F

    def hidden(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None) -> Tensor:
        """f_RWD of a pass of the backbone; see Backbone.step."""
        raise NotImplementedError

    def features(self, read_BNC: Tensor, condition: Condition, grid: tuple[int, int],
                 inject_KBLD: Tensor | None = None) -> Tensor:
        """f_BLD in one differentiable pass. read_BNC: what the slots after the prefix read, made of the tokens or the
        noise (accel.dd2.shifted); row j of inject_KBLD belongs to the slot whose feature is token j's."""
        backbone, (batch, cells) = self.backbone, read_BNC.shape[:2]
        prefix = backbone.prefix_length
        slots_BS = torch.arange(prefix + cells, device=read_BNC.device).expand(batch, -1)
        x_BSD = torch.cat([backbone.prefix(condition), backbone.embed(read_BNC, slots_BS[:, prefix:])], dim=1)
        if inject_KBLD is not None:
            inject_KBLD = F.pad(inject_KBLD, (0, 0, prefix - self.first, 0))
        cache = backbone.new_cache(batch, prefix + cells, grid, condition.caption_mask_BP, store=False)
        return self.hidden(x_BSD, slots_BS, cache, inject_KBLD)[:, prefix - self.first:]

    def velocity(self, x_NC: Tensor, t_N1: Tensor, feature_ND: Tensor) -> Tensor:
        """v_NC at x_t; t in [0, 1], 1 = noise."""
        return self.head(x_NC, self.config.time_scale * t_N1[..., 0], feature_ND)

    def forward(self, read_BNC: Tensor, noise_BLC: Tensor, condition: Condition, grid: tuple[int, int],
                inject_KBLD: Tensor | None = None) -> Tensor:
        """tokens_BLC of one step: q = eps - v(eps, 1, f)."""
        feature_BLD = self.features(read_BNC, condition, grid, inject_KBLD)
        return noise_BLC - self.velocity(noise_BLC, torch.ones_like(noise_BLC[..., :1]), feature_BLD)


@dataclass(frozen=True)
class ARGeneratorConfig(ARConfig):
    """The teacher's shape, the tokenizer's latent channels, the head's size (those that give the paper's totals), and
    what the head multiplies t with (the paper does not say)."""

    latent_dim: int = 8
    head_width: int = 1024
    head_depth: int = 4
    time_scale: float = 1000.0


class ARGenerator(_Generator):
    """Of an ARTransformer, whose token table becomes an MLP; features are taken after the final norm."""

    def __init__(self, config: ARGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_dim, self.first = config.latent_dim, 1
        self.inject_points = len(config.inject_layers)
        self.backbone = LatentTransformer(replace(config, codebook_dim=None), MLP(config.latent_dim, config.dim))
        del self.backbone.output
        self.head = HeadMLP(config.latent_dim, config.latent_dim, config.head_width, config.head_depth, config.dim)

    @classmethod
    def from_teacher(cls, teacher: ARTransformer, latent_dim: int, head_width: int = 1024,
                     head_depth: int = 4) -> ARGenerator:
        """A new network of `teacher`; fresh are the MLP that reads tokens and the head."""
        generator = cls(ARGeneratorConfig(**asdict(teacher.config), latent_dim=latent_dim, head_width=head_width,
                                          head_depth=head_depth))
        generator.to(teacher.norm.weight)
        generator.backbone.copy_from(teacher)
        return generator

    def hidden(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None) -> Tensor:
        """f_RWD after the final norm."""
        return self.backbone.step(x_RWD, slots_RW, cache, inject_KRWD)


@dataclass(frozen=True)
class VARGeneratorConfig(VARConfig):
    """The teacher's shape, the head's size and time scale; see ARGeneratorConfig."""

    head_width: int = 1024
    head_depth: int = 4
    time_scale: float = 1000.0


class VARGenerator(_Generator):
    """Of a VARTransformer; features are taken after the last block."""

    order: ClassVar[Order] = "scales"

    def __init__(self, config: VARGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_dim, self.first = config.codebook_dim, config.sizes[0]
        self.inject_points = len(config.inject_layers)
        self.backbone = VARTransformer(config)
        del self.backbone.head, self.backbone.head_nm
        channels = config.codebook_dim
        self.head = HeadMLP(channels, channels, config.head_width, config.head_depth, config.dim)

    @classmethod
    def from_teacher(cls, teacher: VARTransformer, head_width: int = 1024, head_depth: int = 4) -> VARGenerator:
        """A new network of `teacher`; fresh is the head."""
        generator = cls(VARGeneratorConfig(**asdict(teacher.config), head_width=head_width, head_depth=head_depth))
        generator.to(teacher.pos_1LC)
        generator.backbone.load_state_dict({name: tensor for name, tensor in teacher.state_dict().items()
                                            if not name.startswith(("head.", "head_nm."))})
        return generator

    def hidden(self, x_RWD: Tensor, slots_RW: Tensor, cache: Any, inject_KRWD: Tensor | None = None) -> Tensor:
        """f_RWD before the head's norm, which is not there."""
        return self.backbone.features(x_RWD, slots_RW, cache, inject_KRWD)
