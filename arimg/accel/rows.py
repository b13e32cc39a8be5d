"""Row-parallel decoding: a row begins before the row above is finished. Fewer passes, another law."""

from __future__ import annotations

import torch
from torch import Tensor

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.jacobi import with_forced
from arimg.accel.target import Target
from arimg.devices import to_device
from arimg.errors import InputError


class ZipAR:
    """ZipAR (He et al. 2024, arXiv:2412.04062): row i+1 starts once row i has `window` codes, so h rows of w codes take
    w + (h - 1) * window passes.

    The code before a row's first one is not known yet; the newest code of the row above stands in for it, and is
    replaced in the cache when the true one is there. `window` >= w is plain decoding.
    """

    guarantee: Guarantee = "none"

    def __init__(self, window: int = 8) -> None:
        if not isinstance(window, int) or window < 1:
            raise InputError(f"--window {window}: the decoder zipar takes the whole number of codes that a row is "
                             "ahead of the next one, at least 1")
        self.window = window

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64)."""
        batch, device, (height, width) = request.seeds_B.shape[0], request.seeds_B.device, request.grid
        ahead = min(self.window, width)
        codes_BL = torch.zeros(batch, request.length, dtype=torch.int64, device=device)
        fixed_at = [[0] * request.length for _ in range(batch)]
        last_turn, done = (height - 1) * ahead + width - 1, 0
        for turn in range(last_turn + 1):
            fronts = [(row, turn - row * ahead) for row in range(height)]
            drawn = [row * width + column for row, column in fronts if 0 <= column < width]
            p_BWV = self._laws(target, codes_BL, fronts, turn)
            positions_BW = to_device(drawn, device).expand(batch, -1)
            p_BWV = with_forced(p_BWV, positions_BW, request)
            codes_BL.scatter_(1, positions_BW, target.draw(p_BWV, positions_BW))
            for row in fixed_at:
                for position in drawn:
                    row[position] = turn + 1
            done += len(drawn)
            if on_step is not None:
                on_step(StepInfo(target.forward_passes, done * batch, batch * request.length, codes_BL))
        accepted = tuple(float(fixed_at[0].count(turn + 1)) for turn in range(last_turn + 1))
        return DecodeResult(DecodeStats(target.forward_passes, accepted, extra={"fixed_at": fixed_at}),
                            codes_BL=codes_BL)

    def _laws(self, target: Target, codes_BL: Tensor, fronts: list[tuple[int, int]], turn: int) -> Tensor:
        """p_BWV of the codes that this pass draws, from the top row to the lowest."""
        if turn == 0:
            return target.start()
        width = target.request.grid[1]
        active = [(row, column) for row, column in fronts if 0 <= column < width]
        read = [row * width + column - 1 for row, column in active]
        newest = min(self.window, width) - 1
        known = [row * width + column - 1 if column else (row - 1) * width + newest for row, column in active]
        if self.window < width:     # a finished row's last code replaces what stood in for it
            late = [row * width + width - 1 for row, column in fronts[:-1] if column == width]
            read, known = read + late, known + late
        device = codes_BL.device
        codes_BW = codes_BL[:, to_device(known, device)]
        p_BWV = target.step(codes_BW, to_device(read, device).expand(len(codes_BL), -1), min(read),
                            max(read) + 1)
        return p_BWV[:, :len(active)]
