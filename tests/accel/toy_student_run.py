"""A toy teacher and its one-step student, both trained: pictures of 8 x 8 tokens that copy the token above or to the left,
with a control map that says which cells start anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.accel.base import DecodeRequest, Sampling
from arimg.accel.dd1 import starting_noise
from arimg.accel.flow import FlowSolver
from arimg.accel.target import Target
from arimg.accel.verify import FlowAR
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.models.students import ARStudent
from arimg.tokenizers.vq import VQSpace

GRID, LENGTH, VOCAB, CHANNELS = (8, 8), 64, 8, 4
SPACE = VQSpace(F.normalize(torch.randn(VOCAB, CHANNELS, generator=torch.Generator().manual_seed(0)), dim=-1))
CONFIG = ARConfig(vocab_size=VOCAB, dim=48, layers=3, heads=4, ffn_hidden=96, block_size=LENGTH, num_classes=2,
                  rope_prefix="identity", rope_grid="true", inject_layers=(0, 1), token_dropout=0.0,
                  residual_dropout=0.0, ffn_dropout=0.0)
SOLVER = FlowSolver(20)


def fields(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(codes_BL, starts_BL, class_ids_B): a cell that starts is any code of its class's half, every other one copies its
    left or upper neighbour."""
    classes_B = torch.randint(2, (count,), generator=generator)
    starts = torch.rand(count, *GRID, generator=generator) < 0.25
    fresh = torch.randint(VOCAB // 2, (count, *GRID), generator=generator) + classes_B[:, None, None] * (VOCAB // 2)
    from_left = torch.rand(count, *GRID, generator=generator) < 0.5
    codes = fresh.clone()
    starts[:, 0, 0] = True
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            left = codes[:, row, max(0, column - 1)]
            up = codes[:, max(0, row - 1), column]
            copied = torch.where((from_left[:, row, column] & torch.tensor(column > 0)) | torch.tensor(row == 0), left, up)
            codes[:, row, column] = torch.where(starts[:, row, column], fresh[:, row, column], copied)
    return codes.flatten(1), starts.flatten(1), classes_B
