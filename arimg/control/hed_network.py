"""Holistically-nested edge detection (Xie and Tu, ICCV 2015): VGG16 with one edge map per stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))      # (width, convolutions) of VGG16


class Stage(nn.Module):
    """3x3 convolutions with ReLU, and a 1x1 projection to the logits of this stage's edge map."""

    def __init__(self, in_width: int, width: int, count: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(in_width if i == 0 else width, width, 3, padding=1) for i in range(count))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x_BCHW = F.relu(conv(x_BCHW))
        return x_BCHW, self.projection(x_BCHW)


class HED(nn.Module):
    """RGB pixels in 0..255 to edge probabilities: sigmoid of a learned mix (`fuse`) of the five stages' logits.

    State-dict keys are those of ControlNetHED (`norm`, `block{1..5}.convs.{i}`, `block{1..5}.projection`) and `fuse`.
    Pooling rounds sizes up, so that no picture is too small; at multiples of 16 pixels rounding plays no part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        widths = (3, *(width for width, _ in STAGES))
        for index, (width, count) in enumerate(STAGES):
            self.add_module(f"block{index + 1}", Stage(widths[index], width, count))
        self.fuse = nn.Conv2d(len(STAGES), 1, 1)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """edges_B1HW in [0, 1]."""
        x_BCHW = pixels_B3HW - self.norm
        sides = []
        for index in range(len(STAGES)):
            if index:
                x_BCHW = F.max_pool2d(x_BCHW, 2, ceil_mode=True)
            x_BCHW, logits_B1hw = self.get_submodule(f"block{index + 1}")(x_BCHW)
            sides.append(F.interpolate(logits_B1hw, pixels_B3HW.shape[-2:], mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(sides, dim=1)).sigmoid()


def with_fuse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` itself if it has a fusion layer; ControlNetHED files have none: there the map is the sigmoid of the mean
    of the five logits, which is a fusion with weights 1/5 and bias 0."""
    mean = {"fuse.weight": torch.full((1, len(STAGES), 1, 1), 1 / len(STAGES)), "fuse.bias": torch.zeros(1)}
    return dict(state) if any(key.startswith("fuse.") for key in state) else {**state, **mean}
