"""Plain autoregressive decoding, one token per pass: the oracle of every faster decoder."""

from __future__ import annotations

import torch

from arimg.accel.base import DecodeRequest, DecodeResult, DecodeStats, Guarantee, OnStep, StepInfo
from arimg.accel.target import Target


class PlainAR:
    """Token j of an image is argmax(log p_j + Gumbel(seed, j)), whatever else is in the batch."""

    guarantee: Guarantee = "same-codes"

    @torch.no_grad()
    def decode(self, target: Target, request: DecodeRequest, on_step: OnStep | None = None) -> DecodeResult:
        """codes_BL (int64). Forced codes (>= 0) replace the drawn ones. The loop itself never waits for the device."""
        batch, length = request.seeds_B.shape[0], request.length
        positions_BL = torch.arange(length, device=request.seeds_B.device).expand(batch, -1)
        codes_BL = torch.zeros_like(positions_BL)
        for position in range(length):
            here, before = slice(position, position + 1), slice(position - 1, position)
            if position == 0:
                p_B1V = target.start()
            else:
                p_B1V = target.step(codes_BL[:, before], positions_BL[:, before], reached=position - 1)
            codes_B1 = target.draw(p_B1V, positions_BL[:, here])
            if request.forced_BL is not None:
                forced_B1 = request.forced_BL[:, here]
                codes_B1 = torch.where(forced_B1 >= 0, forced_B1, codes_B1)
            codes_BL[:, here] = codes_B1
            if on_step is not None:
                on_step(StepInfo(target.forward_passes, (position + 1) * batch, batch * length, codes_BL))
        stats = DecodeStats(target.forward_passes, accepted_per_pass=(1.0,) * length,
                            extra={"fixed_at": [list(range(1, length + 1))] * batch})
        return DecodeResult(stats, codes_BL=codes_BL)
