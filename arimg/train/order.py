"""The order of samples as a function of (seed, epoch): nothing to save, nothing to lose on resume.

The M micro-batches of a step are M *lanes*. An epoch is one permutation of all samples, cut into M equal stretches, and
lane m walks through stretch m: every sample is seen exactly once per epoch by all lanes together, whatever processes
and threads work on them, and a process reads its own shards only. Shards are shuffled, then the samples inside windows
of a few shards, so that a lane reads a few files at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_SHARDS, _WINDOW = 21, 22       # purposes of random draws


class EpochOrder:
    """Samples 0 .. N-1 that lie on the disk in consecutive groups (shards) of these sizes."""

    def __init__(self, sizes: Sequence[int], seed: int, lanes: int, window: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.count = int(self.starts[-1])
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self._plan = lru_cache(maxsize=4)(self._make_plan)
        self._samples = lru_cache(maxsize=2 * lanes + 2)(self._make_samples)
        assert self.count >= lanes, (self.count, lanes)

    def lane(self, lane: int, first: int, count: int) -> np.ndarray:
        """Samples number `first` .. `first` + `count` - 1 of a lane's endless stream, epoch after epoch."""
        assert 0 <= lane < self.lanes, (lane, self.lanes)
        begin, end = (self.count * edge // self.lanes for edge in (lane, lane + 1))
        rows = np.arange(first, first + count)
        epochs, offsets = np.divmod(rows, end - begin)
        return np.array([self.at(int(epoch), begin + int(offset)) for epoch, offset in zip(epochs, offsets)])

    def at(self, epoch: int, place: int) -> int:
        """The sample at this place of an epoch's permutation."""
        window_starts, _ = self._plan(epoch)
        window = int(np.searchsorted(window_starts, place, side="right")) - 1
        return int(self._samples(epoch, window)[place - window_starts[window]])

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """(places at which the windows begin, shards of each window)."""
        filled = np.flatnonzero(self.sizes)
        shards = np.random.default_rng([self.seed, _SHARDS, epoch]).permutation(filled)
        windows = [shards[i:i + self.window] for i in range(0, len(shards), self.window)]
        sizes = [int(self.sizes[window].sum()) for window in windows]
        return np.concatenate([[0], np.cumsum(sizes)[:-1]]), windows

    def _make_samples(self, epoch: int, window: int) -> np.ndarray:
        shards = self._plan(epoch)[1][window]
        samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards])
        return np.random.default_rng([self.seed, _WINDOW, epoch, window]).permutation(samples)
