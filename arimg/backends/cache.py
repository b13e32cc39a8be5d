"""Keys and values by slot, on the host: a graph reads them in place and hands back those of its own pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.models.layers import EXTENT_STEP

UNSEEN = -1e30          # added to a score; exp of it is 0, and so is 0 times what stands in an unwritten slot


class Pass(NamedTuple):
    """What a graph needs to know of one pass besides its input."""

    turn_RWF2: Tensor       # (cos, sin)
    bias_R11WN: Tensor      # past slots, then the pass itself
    past_NRG1SE: Tensor     # N = 2 * layers: keys and values of layer 0, of layer 1 ...


@dataclass
class SlotCache:
    """Grows with the slots that were written. Entries at scratch slots are seen by themselves alone, so they are not
    kept."""

    rope_SF2: Tensor
    real_RS: Tensor             # bool, False on padded caption slots; scratch included
    written_RS: Tensor          # bool, written and real
    store_NRG1SE: Tensor

    def limit(self, stop: int) -> None:
        """See KVCache; what was written says enough here."""

    def open(self, slots_RW: Tensor, mask_RWW: Tensor | None, at_RW: Tensor | None) -> Pass:
        """Begin a pass; see models.layers.Cache.open for what it sees."""
        rows, width = slots_RW.shape
        at_RW1 = (slots_RW if at_RW is None else at_RW)[..., None]
        past_NRG1SE = self.store_NRG1SE[:, :rows]
        columns_S = torch.arange(past_NRG1SE.shape[4])
        kept_RS = self.written_RS[:rows].scatter(1, slots_RW, False)[:, :len(columns_S)]
        before_RWS = kept_RS[:, None] & (columns_S < at_RW1)
        if mask_RWW is None:
            real_RW = self.real_RS[:rows].gather(1, slots_RW)
            mask_RWW = (slots_RW[:, None] < at_RW1) & real_RW[:, None] | torch.eye(width, dtype=torch.bool)
        visible_RWN = torch.cat([before_RWS, mask_RWW], dim=2)
        bias_RWN = torch.zeros(visible_RWN.shape).masked_fill_(~visible_RWN, UNSEEN)
        return Pass(self.rope_SF2[at_RW1[..., 0]], bias_RWN[:, None, None], past_NRG1SE)

    def write(self, slots_RW: Tensor, fresh: Tensor) -> None:
        """Keep keys and values of a pass, in any shape whose order is (N, R, G, 1, W, E)."""
        rows, width = slots_RW.shape
        kept = int((slots_RW[0] < len(self.rope_SF2)).sum())        # scratch slots come last
        slots_RW = slots_RW[:, :kept]
        self._hold(int(slots_RW.max()) + 1)
        count, _, groups, _, _, channels = self.store_NRG1SE.shape
        fresh_NRGWE = fresh.view(count, rows, groups, width, channels)[:, :, :, :kept]
        store_NRGSE = self.store_NRG1SE[:, :rows, :, 0]
        first = int(slots_RW[0, 0])
        if bool((slots_RW == torch.arange(first, first + kept)).all()):     # one run of slots, as in plain decoding
            store_NRGSE[:, :, :, first:first + kept] = fresh_NRGWE
        else:
            place = (torch.arange(rows)[:, None], slots_RW)
            store_NRGSE.permute(1, 3, 0, 2, 4).index_put_(place, fresh_NRGWE.permute(1, 3, 0, 2, 4))
        real_RW = self.real_RS[:rows].gather(1, slots_RW)
        self.written_RS[:rows].scatter_(1, slots_RW, real_RW)

    def _hold(self, slots: int) -> None:
        """Room for so many slots, in steps: runtimes prepare themselves anew for every size."""
        room = self.store_NRG1SE.shape[4]
        if slots > room:
            more = min(-(-slots // EXTENT_STEP) * EXTENT_STEP, len(self.rope_SF2)) - room
            self.store_NRG1SE = F.pad(self.store_NRG1SE, (0, 0, 0, more))


def new_slot_cache(rope_SF2: Tensor, layers: int, rows: int, heads: int, channels: int, scratch: int,
                   prefix_mask_RP: Tensor | None) -> SlotCache:
    """Empty, with a row of the table for every slot but the scratch ones."""
    slots = len(rope_SF2) + scratch
    real_RS = torch.ones(rows, slots, dtype=torch.bool)
    if prefix_mask_RP is not None:
        real_RS[:, :prefix_mask_RP.shape[1]] = prefix_mask_RP.bool()
    return SlotCache(rope_SF2, real_RS, torch.zeros_like(real_RS),
                     torch.zeros(2 * layers, rows, heads, 1, min(EXTENT_STEP, len(rope_SF2)), channels))
