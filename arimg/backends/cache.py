"""Keys and values by slot, on the host: a graph reads them in place, and writes those of its own pass there as well or
hands them back (graphs.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.backends.runtimes import BoundGraph
from arimg.models.layers import EXTENT_STEP

UNSEEN = -1e30          # added to a score; exp of it is 0, and so is 0 times what stands in an unwritten slot


class Pass(NamedTuple):
    """What a graph needs to know of one pass besides its input."""

    turn_RWF2: Tensor       # (cos, sin)
    bias: Tensor            # of the slots that it reads; see graphs.step_graph
    past: Tensor            # keys and values of layer 0, of layer 1 ...


@dataclass
class SlotCache:
    """Grows with the slots that were written."""

    rope_SF2: Tensor            # of every slot but the scratch ones
    real_RS: Tensor             # bool, False on padded caption slots; scratch included, and whole steps
    written_RS: Tensor          # bool, written and real
    store_NRGSE: Tensor

    def limit(self, stop: int) -> None:
        """See KVCache; what was written says enough here."""

    def hold(self, slots: int) -> None:
        """Room for so many slots, in steps: runtimes prepare themselves anew for every size."""
        room = self.store_NRGSE.shape[3]
        if slots > room:
            self.store_NRGSE = F.pad(self.store_NRGSE, (0, 0, 0, _whole_steps(slots) - room))


@dataclass
class PlaceCache(SlotCache):
    """The graph writes keys and values, those of scratch slots too, as models.layers.Cache does: from the first pass
    with leaves on, passes read all slots."""

    bound: BoundGraph | None = None

    def open(self, slots_RW: Tensor, mask_RWW: Tensor | None, at_RW: Tensor | None) -> Pass:
        """Begin a pass; see models.layers.Cache.open for what it sees."""
        rows, width = slots_RW.shape
        at_RW = slots_RW if at_RW is None else at_RW
        self.hold(1 + int(slots_RW.max()))
        past_NRGSE = self.store_NRGSE[:, :rows]
        self.written_RS[:rows].scatter_(1, slots_RW, self.real_RS[:rows].gather(1, slots_RW))
        columns_S = torch.arange(past_NRGSE.shape[3])
        visible_RWS = self.written_RS[:rows, None, :len(columns_S)] & (columns_S < at_RW[..., None])
        visible_RWS |= columns_S == slots_RW[..., None]
        if mask_RWW is not None:
            visible_RWS.scatter_(2, slots_RW[:, None].expand(-1, width, -1), mask_RWW)
        return Pass(self.rope_SF2[at_RW], _bias(visible_RWS)[:, :, None, None], past_NRGSE[:, :, None])


@dataclass
class HandedCache(SlotCache):
    """The graph hands keys and values back. Entries at scratch slots are seen by themselves alone, so they are not
    kept."""

    def open(self, slots_RW: Tensor, mask_RWW: Tensor | None, at_RW: Tensor | None) -> Pass:
        """Begin a pass; see models.layers.Cache.open for what it sees."""
        rows, width = slots_RW.shape
        at_RW1 = (slots_RW if at_RW is None else at_RW)[..., None]
        past_NRGSE = self.store_NRGSE[:, :rows]
        columns_S = torch.arange(past_NRGSE.shape[3])
        kept_RS = self.written_RS[:rows].scatter(1, slots_RW, False)[:, :len(columns_S)]
        before_RWS = kept_RS[:, None] & (columns_S < at_RW1)
        if mask_RWW is None:
            real_RW = self.real_RS[:rows].gather(1, slots_RW)
            mask_RWW = (slots_RW[:, None] < at_RW1) & real_RW[:, None] | torch.eye(width, dtype=torch.bool)
        bias_RWN = _bias(torch.cat([before_RWS, mask_RWW], dim=2))
        return Pass(self.rope_SF2[at_RW1[..., 0]], bias_RWN[:, None], past_NRGSE)

    def write(self, slots_RW: Tensor, fresh: Tensor) -> None:
        """Keep keys and values of a pass, (N * R, G, W, E)."""
        slots = slots_RW.tolist()
        kept = sum(slot < len(self.rope_SF2) for slot in slots[0])      # scratch slots come last
        first, stop = slots[0][0], 1 + max(max(row[:kept]) for row in slots)
        self.hold(stop)
        store_NRGSE = self.store_NRGSE[:, :len(slots)]
        fresh_NRGWE = fresh.unflatten(0, (-1, len(slots)))[:, :, :, :kept]
        if all(row[:kept] == list(range(first, stop)) for row in slots):        # one run of slots, as in plain decoding
            store_NRGSE[:, :, :, first:stop] = fresh_NRGWE
            self.written_RS[:len(slots), first:stop] = self.real_RS[:len(slots), first:stop]
        else:
            rows, slots_RW = torch.arange(len(slots))[:, None], slots_RW[:, :kept]
            store_NRGSE.permute(1, 3, 0, 2, 4).index_put_((rows, slots_RW), fresh_NRGWE.permute(1, 3, 0, 2, 4))
            self.written_RS[rows, slots_RW] = self.real_RS[rows, slots_RW]


def _whole_steps(slots: int) -> int:
    return -(-slots // EXTENT_STEP) * EXTENT_STEP


def _bias(visible_RWN: Tensor) -> Tensor:
    return torch.zeros(visible_RWN.shape).masked_fill_(~visible_RWN, UNSEEN)


def new_slot_cache(kind: type[SlotCache], rope_SF2: Tensor, layers: int, rows: int, heads: int, channels: int,
                   scratch: int, prefix_mask_RP: Tensor | None) -> SlotCache:
    """Empty, with a row of the table for every slot but the scratch ones."""
    slots = _whole_steps(len(rope_SF2) + scratch)
    real_RS = torch.ones(rows, slots, dtype=torch.bool)
    if prefix_mask_RP is not None:
        real_RS[:, :prefix_mask_RP.shape[1]] = prefix_mask_RP.bool()
    return kind(rope_SF2, real_RS, torch.zeros_like(real_RS),
                torch.zeros(2 * layers, rows, heads, EXTENT_STEP, channels))
