"""The networks that dd1 and dd2 need, for toy pipelines: random weights, the same in every call."""

from __future__ import annotations

import torch

from arimg.models.base import order_of
from arimg.models.generators import ARGenerator, VARGenerator
from arimg.models.students import ARStudent
from arimg.models.var_students import VARStudent
from arimg.pipeline import Pipeline

HEAD = {"head_width": 16, "head_depth": 2}


def with_students(pipe: Pipeline, timesteps: tuple[int, ...] = (0, 2), split: int | None = None) -> Pipeline:
    """The pipeline itself, with an untrained student and generator of its transformer."""
    teacher, space = pipe.transformer, pipe.tokenizer.space()
    channels = space.codebook_VC.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if order_of(teacher) == "scales":
            pipe.decoders = {"dd1": VARStudent.from_teacher(teacher, timesteps, split),
                             "dd2": VARGenerator.from_teacher(teacher, **HEAD)}
        else:
            pipe.decoders = {"dd1": ARStudent.from_teacher(teacher, channels, timesteps, split),
                             "dd2": ARGenerator.from_teacher(teacher, channels, **HEAD)}
        for network in pipe.decoders.values():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
            network.eval()
    return pipe
