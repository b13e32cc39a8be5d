"""A toy teacher and its one-step student, both trained here: fields of 8 x 8 tokens, each of which starts anew or
copies the token to its left or above; a control map says which start."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.accel.base import DecodeRequest
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
SOLVER, BATCH, RATE = FlowSolver(20), 64, 4e-3


def fields(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Condition]:
    """(codes_BL, starts_BL, classes): a token that starts is any code of its class's half."""
    class_ids_B = torch.randint(2, (count,), generator=generator)
    starts_BHW = torch.rand(count, *GRID, generator=generator) < 0.25
    fresh_BHW = torch.randint(VOCAB // 2, (count, *GRID), generator=generator) + VOCAB // 2 * class_ids_B[:, None, None]
    leftward_BHW = torch.rand(count, *GRID, generator=generator) < 0.5
    codes_BHW = fresh_BHW.clone()
    for row in range(GRID[0]):
        for column in range(1 if row == 0 else 0, GRID[1]):
            left_B = codes_BHW[:, row, max(0, column - 1)]
            up_B = codes_BHW[:, max(0, row - 1), column]
            from_left_B = leftward_BHW[:, row, column] & (column > 0) | (row == 0)
            copied_B, starts_B = torch.where(from_left_B, left_B, up_B), starts_BHW[:, row, column]
            codes_BHW[:, row, column] = torch.where(starts_B, fresh_BHW[:, row, column], copied_B)
    return codes_BHW.flatten(1), starts_BHW.flatten(1), Condition(class_ids_B=class_ids_B)


class Teacher(nn.Module):
    """A transformer and a control path of one table."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.control = ARTransformer(CONFIG), nn.Embedding(2, 2 * CONFIG.dim)
        nn.init.normal_(self.transformer.output.weight, std=0.02)

    def inject(self, starts_BL: Tensor) -> Tensor:
        """inject_KBLD."""
        return self.control(starts_BL.long()).unflatten(-1, (2, -1)).movedim(2, 0)

    @torch.no_grad()
    def request(self, count: int, first_seed: int, generator: torch.Generator) -> DecodeRequest:
        """New maps and classes; seeds from first_seed on."""
        _, starts_BL, condition = fields(count, generator)
        return DecodeRequest(condition, GRID, torch.arange(first_seed, first_seed + count), self.inject(starts_BL),
                             space=SPACE)


def steps_of(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)


def trained_teacher(steps: int) -> Teacher:
    """On fields, by cross entropy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, generator = Teacher(), torch.Generator().manual_seed(1)
    optimizer, schedule = steps_of(teacher, steps)
    for _ in range(steps):
        codes_BL, starts_BL, condition = fields(BATCH, generator)
        logits_BLV = teacher.transformer(codes_BL, condition, GRID, teacher.inject(starts_BL))
        optimizer.zero_grad()
        F.cross_entropy(logits_BLV.mT, codes_BL).backward()
        optimizer.step()
        schedule.step()
    return teacher.eval()


def trained_student(teacher: Teacher, pairs: int, steps: int) -> ARStudent:
    """On pairs of noise and what the teacher's flow makes of it, by cross entropy."""
    generator = torch.Generator().manual_seed(2)
    asked = teacher.request(pairs, 1000, generator)
    codes_BL = FlowAR(SOLVER).decode(Target(teacher.transformer, asked), asked).codes_BL
    assert codes_BL is not None and asked.inject_KBLD is not None and asked.condition.class_ids_B is not None
    noise_BLC = starting_noise(asked)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student = ARStudent.from_teacher(teacher.transformer, CHANNELS)
    optimizer, schedule = steps_of(student, steps)
    for _ in range(steps):
        rows = torch.randint(pairs, (BATCH,), generator=generator)
        condition = Condition(class_ids_B=asked.condition.class_ids_B[rows])
        logits_BLV, _ = student(noise_BLC[rows], torch.zeros(BATCH), condition, GRID, asked.inject_KBLD[:, rows])
        optimizer.zero_grad()
        F.cross_entropy(logits_BLV.mT, codes_BL[rows]).backward()
        optimizer.step()
        schedule.step()
    return student.eval()


def single(asked: DecodeRequest, k: int) -> DecodeRequest:
    """Picture k alone."""
    assert asked.inject_KBLD is not None and asked.condition.class_ids_B is not None
    return replace(asked, condition=Condition(class_ids_B=asked.condition.class_ids_B[k:k + 1]),
                   seeds_B=asked.seeds_B[k:k + 1], inject_KBLD=asked.inject_KBLD[:, k:k + 1])
