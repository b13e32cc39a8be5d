"""DD1's student of a VARTransformer (Liu et al. 2024, arXiv:2412.17153); see models/students.py.

Before the teacher's scales stands one more, of one cell, for the class. A token sees the class, all coarser scales and
itself; nothing else of its own scale, so that its noise alone decides among the tokens of a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.models.base import Condition, Order
from arimg.models.students import LatentHead, StudentOutput, checked_timesteps, clean_mask
from arimg.models.var import Block, VARConfig, VARTransformer, init_linear


@dataclass(frozen=True)
class VARStudentConfig(VARConfig):
    """The teacher's shape, and the passes. Raises ConfigError."""

    timesteps: tuple[int, ...] = (0,)       # clean scales of the passes that it was trained for
    split: int | None = None                # scales from here on end as latents, earlier ones as codes; None: all codes

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timesteps", checked_timesteps(self.timesteps, self.split))


class VARStudent(nn.Module):
    """Slot 1+j reads token j of the scales in one row, clean or noise, not the maps that the teacher reads.

    The noise/data embedding is added to the input, in every block between attention and FFN, and before both heads,
    each time through a linear layer of its own. `config.scales` are the teacher's.
    """

    order: ClassVar[Order] = "scales"

    def __init__(self, config: VARStudentConfig) -> None:
        super().__init__()
        self.config = config
        teacher = VARConfig(**{one.name: getattr(config, one.name) for one in fields(VARConfig)})
        self.vocab_size, self.latent_dim = config.vocab_size, config.codebook_dim
        self.inject_points = len(config.inject_layers)
        self.backbone = VARTransformer(replace(teacher, scales=((1, 1), *config.scales)))
        self.n_d_embed = nn.Embedding(2, config.dim)        # 0 noise, 1 data; the class is data
        self.layerwise_n_d_embed = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.layers + 1))
        self.final_layer_conti = LatentHead(config.dim, config.codebook_dim)
        fresh = (self.n_d_embed, *self.layerwise_n_d_embed, self.final_layer_conti.linear)
        init_linear(fresh, (3 * config.dim) ** -0.5)

    @classmethod
    def from_teacher(cls, teacher: VARTransformer, timesteps: Sequence[int] = (0,),
                     split: int | None = None) -> VARStudent:
        """A new student of `teacher`. Its level and position tables have rows for the first scale, which are fresh:
        the teacher's rows there were those of the class, and so they remain. Fresh are also all noise/data layers and
        the latent head; all else is copied. (The released initialisation made row 1 of the *class* table fresh
        instead.)"""
        student = cls(VARStudentConfig(**asdict(teacher.config), timesteps=tuple(timesteps), split=split))
        student.to(teacher.pos_1LC)
        own, given = student.backbone.state_dict(), teacher.state_dict()
        first = teacher.prefix_length
        given["pos_start"] = given["pos_start"][:, :1]
        for name, axis, cells in (("lvl_embed.weight", 0, 1), ("pos_1LC", 1, first)):
            given[name] = torch.cat([given[name].narrow(axis, 0, 1), own[name].narrow(axis, 1, cells),
                                     given[name].narrow(axis, cells, given[name].shape[axis] - cells)], dim=axis)
        student.backbone.load_state_dict(given)
        return student

    def mask(self, device: torch.device) -> Tensor:
        """Bool (S, S), S = 1+L: what each slot sees."""
        levels_S = self.backbone.levels(device)
        return (levels_S[:, None] > levels_S) | torch.eye(len(levels_S), dtype=torch.bool, device=device)

    def forward(self, latents_BLC: Tensor, clean_B: Tensor, condition: Condition, grid: tuple[int, int],
                inject_KBLD: Tensor | None = None) -> StudentOutput:
        """Both heads after `features`."""
        h_BLD = self.features(latents_BLC, clean_B, condition, grid, inject_KBLD)
        return StudentOutput(self.logits(h_BLD, condition), self.latents(h_BLD, condition))

    def features(self, latents_BLC: Tensor, clean_B: Tensor, condition: Condition, grid: tuple[int, int],
                 inject_KBLD: Tensor | None = None) -> Tensor:
        """h_BLD, in one differentiable pass. Token j of latents_BLC is a code vector where j < clean_B, else noise; row
        j of inject_KBLD belongs to it. Raises InputError as VARTransformer does."""
        backbone, (batch, length) = self.backbone, latents_BLC.shape[:2]
        slots_BS = torch.arange(1 + length, device=latents_BLC.device).expand(batch, -1)
        class_B1D = backbone.prefix(condition)
        kinds_BSD = self.n_d_embed(F.pad(clean_mask(clean_B, length), (1, 0), value=True).long())
        x_BSD = torch.cat([class_B1D, backbone.embed(latents_BLC, slots_BS[:, 1:])], dim=1) + kinds_BSD
        x_BSD = x_BSD + backbone.places(slots_BS, backbone.levels(slots_BS.device)[slots_BS])
        if inject_KBLD is not None:
            inject_KBLD = F.pad(inject_KBLD, (0, 0, 1, 0))
        h_BSD = self._blocks(x_BSD, kinds_BSD, class_B1D[:, 0], slots_BS, grid, inject_KBLD)
        return (h_BSD + self.layerwise_n_d_embed[-1](kinds_BSD))[:, 1:]

    def logits(self, h_BWD: Tensor, condition: Condition) -> Tensor:
        """logits_BWV of some tokens."""
        return self.backbone.logits(self.backbone.head_nm(h_BWD, self.backbone.prefix(condition)[:, 0]))

    def latents(self, h_BWD: Tensor, condition: Condition) -> Tensor:
        """latents_BWC of some tokens."""
        return self.final_layer_conti(h_BWD, self.backbone.prefix(condition)[:, 0])

    def _blocks(self, x_BSD: Tensor, kinds_BSD: Tensor, class_BD: Tensor, slots_BS: Tensor, grid: tuple[int, int],
                inject_KBSD: Tensor | None) -> Tensor:
        """The teacher's blocks, with the noise/data layer between attention and FFN."""
        backbone = self.backbone
        cache = backbone.new_cache(len(x_BSD), x_BSD.shape[1], grid, store=False)
        window = cache.slots.open(slots_BS, self.mask(x_BSD.device)[None])
        shared_B6D = None
        if backbone.shared_ada_lin is not None:
            shared_B6D = backbone.shared_ada_lin(class_BD).unflatten(-1, (6, -1))
        for index, (block, kind_layer) in enumerate(zip(backbone.blocks, self.layerwise_n_d_embed)):
            assert isinstance(block, Block)
            if inject_KBSD is not None:
                for k, place in enumerate(self.config.inject_layers):
                    if place == index:
                        x_BSD = x_BSD + inject_KBSD[k].to(x_BSD.dtype)
            six = block.modulation(class_BD, shared_B6D)
            x_BSD = block.attend(x_BSD, six, window, backbone.attention_backend) + kind_layer(kinds_BSD)
            x_BSD = block.feed(x_BSD, six)
        return x_BSD
