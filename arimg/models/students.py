"""The one-step students of Distilled Decoding 1 (Liu et al. 2024, arXiv:2412.17153): the teacher's backbone, reading at
each position that position's own token, clean or noise, and telling what the noise flows into.

The first tokens of a sequence may be clean, those that a noise/data embedding marks; all others are Gaussian noise.
Both heads speak of the same token: logits over the codes, and a latent that goes to the tokenizer's decoder as it is.

Letters: B images; L tokens; C latent channels; D width; V codes; P prefix slots; K injection points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.errors import ConfigError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition

_NORM_EPS = 1e-6


class StudentOutput(NamedTuple):
    """What a student says of every token; of clean ones it means nothing."""

    logits_BLV: Tensor
    latents_BLC: Tensor


class LatentHead(nn.Module):
    """linear(LN(h) (1 + scale) + shift), shift and scale = a learnt table + the condition's row (PixArt's last layer,
    Chen et al. 2023, arXiv:2310.00426)."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.linear = nn.Linear(dim, latent_dim)
        nn.init.normal_(self.scale_shift_table, std=dim ** -0.5)

    def forward(self, h_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        """latents_BLC."""
        shift_B1D, scale_B1D = (self.scale_shift_table + condition_BD[:, None])[:, None].unbind(2)
        return self.linear(F.layer_norm(h_BLD, h_BLD.shape[-1:], eps=_NORM_EPS) * (1 + scale_B1D) + shift_B1D)


def clean_mask(clean_B: Tensor, length: int) -> Tensor:
    """Bool (B, L): the first clean_B tokens of each row."""
    return torch.arange(length, device=clean_B.device) < clean_B[:, None]


def checked_timesteps(timesteps: Sequence[int], split: int | None) -> tuple[int, ...]:
    """The passes that a student was trained for, as a tuple. Raises ConfigError."""
    if not timesteps or timesteps[0] != 0 or any(t >= s for t, s in pairwise(timesteps)):
        raise ConfigError(f"timesteps {list(timesteps)}: numbers of clean units that grow from 0, such as 0, 5")
    if split is not None and split < 0:
        raise ConfigError(f"split {split}: needs a number of units >= 0")
    return tuple(timesteps)


@dataclass(frozen=True)
class ARStudentConfig(ARConfig):
    """The teacher's shape, the tokenizer's latent channels, the passes. Raises ConfigError."""

    latent_dim: int = 8
    timesteps: tuple[int, ...] = (0,)       # clean tokens of the passes that it was trained for
    split: int | None = None                # tokens from here on end as latents, earlier ones as codes; None: all codes

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timesteps", checked_timesteps(self.timesteps, self.split))
        if self.codebook_dim not in (None, self.latent_dim):
            raise ConfigError(f"latent_dim {self.latent_dim}: the codebook that the head is tied to has "
                              f"{self.codebook_dim} channels; give that number")


class ARStudent(nn.Module):
    """The student of an ARTransformer. Slot P+j reads token j and its output speaks of token j: nothing is shifted.

    `backbone` is the teacher with a linear layer where its token table was.
    """

    def __init__(self, config: ARStudentConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.latent_dim = config.vocab_size, config.latent_dim
        self.inject_points = len(config.inject_layers)
        self.backbone = LatentTransformer(config, nn.Linear(config.latent_dim, config.dim))
        self.n_d_embed = nn.Embedding(2, config.dim)        # 0 noise, 1 data; the prefix is data
        self.final_layer_conti = LatentHead(config.dim, config.latent_dim)
        nn.init.normal_(self.n_d_embed.weight, std=0.02)

    @classmethod
    def from_teacher(cls, teacher: ARTransformer, latent_dim: int, timesteps: Sequence[int] = (0,),
                     split: int | None = None) -> ARStudent:
        """A new student of `teacher`: its class or caption layers, blocks, final norm and output are copied; input
        layer, noise/data rows and latent head are fresh. With a tied codebook the input layer is the teacher's too."""
        student = cls(ARStudentConfig(**asdict(teacher.config), latent_dim=latent_dim, timesteps=tuple(timesteps),
                                      split=split))
        student.to(teacher.norm.weight)
        student.backbone.copy_from(teacher)
        return student

    def compile_pass(self, **options: Any) -> None:
        """Compile the layers, see ARTransformer.compile_step."""
        backend = self.backbone.attention_backend
        self.backbone.compile_step(**options)
        if self.backbone.attention_backend == "math":       # which is for passes of few positions
            self.backbone.attention_backend = backend

    def forward(self, latents_BLC: Tensor, clean_B: Tensor, condition: Condition, grid: tuple[int, int],
                inject_KBLD: Tensor | None = None) -> StudentOutput:
        """Both heads after `features`."""
        h_BLD = self.features(latents_BLC, clean_B, condition, grid, inject_KBLD)
        return StudentOutput(self.logits(h_BLD, condition), self.latents(h_BLD, condition))

    def features(self, latents_BLC: Tensor, clean_B: Tensor, condition: Condition, grid: tuple[int, int],
                 inject_KBLD: Tensor | None = None) -> Tensor:
        """h_BLD, in one differentiable pass. Token j of latents_BLC is a code vector where j < clean_B, else noise; row
        j of inject_KBLD belongs to it. Raises InputError as ARTransformer does."""
        backbone, length = self.backbone, latents_BLC.shape[1]
        prefix = backbone.prefix_length
        slots_BS = torch.arange(prefix + length, device=latents_BLC.device).expand(len(latents_BLC), -1)
        x_BSD = torch.cat([backbone.prefix(condition), backbone.embed(latents_BLC, slots_BS[:, prefix:])], dim=1)
        x_BSD = x_BSD + self.n_d_embed(F.pad(clean_mask(clean_B, length), (prefix, 0), value=True).long())
        if inject_KBLD is not None:
            inject_KBLD = F.pad(inject_KBLD, (0, 0, prefix, 0))
        cache = backbone.new_cache(len(x_BSD), prefix + length, grid, condition.caption_mask_BP, store=False)
        return backbone.features(x_BSD, slots_BS, cache, inject_KBLD)[:, prefix:]

    def logits(self, h_BWD: Tensor, condition: Condition) -> Tensor:
        """logits_BWV of some tokens."""
        return self.backbone.logits(self.backbone.norm(h_BWD))

    def latents(self, h_BWD: Tensor, condition: Condition) -> Tensor:
        """latents_BWC of some tokens."""
        return self.final_layer_conti(h_BWD, self._condition_row(condition))

    def _condition_row(self, condition: Condition) -> Tensor:
        """(B, D): the class row; of a caption (no released student reads one) the mean of its real slots."""
        rows_BPD = self.backbone.cls_embedding(condition)
        if condition.caption_mask_BP is None:
            return rows_BPD.mean(1)
        mask_BP1 = condition.caption_mask_BP[..., None].to(rows_BPD.dtype)
        return (rows_BPD * mask_BP1).sum(1) / mask_BP1.sum(1).clamp_min(1)


class LatentTransformer(ARTransformer):
    """An ARTransformer that reads latents_RWC through `reader` instead of codes through a table."""

    def __init__(self, config: ARConfig, reader: nn.Module) -> None:
        super().__init__(config)
        self.tok_embeddings = reader
        if config.codebook_dim is not None:
            del self.codebook_in
        for module in reader.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, latents_RWC: Tensor, slots_RW: Tensor) -> Tensor:
        """x_RWD."""
        return self.tok_dropout(self.tok_embeddings(latents_RWC.to(self.norm.weight.dtype)))

    def copy_from(self, teacher: ARTransformer) -> None:
        """Take over all that both have. With a tied codebook that includes how the teacher reads code vectors."""
        own, given = self.state_dict(), teacher.state_dict()
        given.pop("tok_embeddings.weight")
        if "codebook_in.weight" in given and "tok_embeddings.weight" in own:
            given["tok_embeddings.weight"] = given["codebook_in.weight"]
        fresh = [name for name in own if name not in given and not name.startswith("tok_embeddings.")]
        assert not fresh, fresh
        self.load_state_dict({name: given.get(name, tensor) for name, tensor in own.items()})
