"""The exact law of a decoder's codes: its production loop (begin, then advance after advance) runs under a source of
noise that takes every outcome of every draw, each with its probability.

All decodes in progress lie side by side in one ragged batch. A pass is run again and again: the first draw that has no
scripted outcome stops it, every decode is replaced by one copy for each outcome, and the pass starts over with these
outcomes as script, until it comes to its end. Decodes that have become equal in all that can matter later are merged.

A draw is a function of a hidden uniform number, one for each key (image, position, purpose, draw): the code whose piece
of the cumulated law it falls into. A key that is asked again keeps its number, of which only the interval is known that
earlier outcomes leave. No rule may depend on more than that equal keys share a number and others are independent.

Letters: S decodes; I images of a decode; R = S*I rows, image after image of each decode; X decodes after branching;
E draws of a decode in one call; O outcomes; G guidance branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.drafts import Blank, DraftInit
from arimg.accel.jacobi import Run, SpeculativeJacobi
from arimg.accel.target import Target
from arimg.accel.windows import Pass
from arimg.noise import Purpose
from tests.exactness.tiny import NOTHING, Case

Key = tuple[Purpose, int]
DECIMALS = 13           # of cumulated laws, so that equal laws have equal pieces
LIMIT = 60_000          # decodes side by side


@dataclass
class States:
    """Decodes in progress, after the same number of passes."""

    weight_S: Tensor
    images: int
    run: dict[str, Any]             # fields of Run by row, `passes` as (R, T, 2) widths and counts; {} before any pass
    cache_RGN: Tensor               # codes in the cache
    hidden: dict[Key, Tensor]       # (R, L, 2): interval of the uniform number behind each key
    script: list[Tensor]            # outcomes of this pass's draws so far, (R, W) each

    def pick(self, chosen_X: Tensor) -> States:
        """These decodes, in this order."""
        rows_R = (chosen_X[:, None] * self.images + torch.arange(self.images)).flatten()
        return replace(self, weight_S=self.weight_S[chosen_X], cache_RGN=self.cache_RGN[rows_R],
                       run={name: None if value is None else value[rows_R] for name, value in self.run.items()},
                       hidden={key: value[rows_R] for key, value in self.hidden.items()},
                       script=[outcome[rows_R] for outcome in self.script])

    def by_decode(self, values_R: Tensor) -> Tensor:
        """(S, everything of its rows)."""
        return values_R.unflatten(0, (len(self.weight_S), self.images)).flatten(1)


def cat(parts: list[States]) -> States:
    """All decodes of all parts."""
    first = parts[0]
    run = {name: None if value is None else torch.cat([part.run[name] for part in parts])
           for name, value in first.run.items()}
    keys = {key: value for part in parts for key, value in part.hidden.items()}
    hidden = {key: torch.cat([part.hidden[key] if key in part.hidden else untouched(len(part.cache_RGN), any_.shape[1])
                              for part in parts]) for key, any_ in keys.items()}
    return replace(first, weight_S=torch.cat([part.weight_S for part in parts]), run=run, hidden=hidden,
                   cache_RGN=torch.cat([part.cache_RGN for part in parts]))


def untouched(rows: int, length: int) -> Tensor:
    """(R, L, 2): the interval [0, 1) everywhere."""
    return torch.tensor([0.0, 1.0], dtype=torch.float64).expand(rows, length, 2)


class Fork(Exception):
    """A draw without a scripted outcome. Outcome o of an entry has the piece [low, high) of the known interval.
    Position L stands for entries that mean nothing."""

    def __init__(self, key: Key, length: int, positions_RW: Tensor, low_RWO: Tensor, high_RWO: Tensor,
                 known_RW: Tensor) -> None:
        super().__init__(key)
        self.key, self.length, self.positions_RW, self.known_RW = key, length, positions_RW, known_RW
        self.low_RWO, self.high_RWO = low_RWO, high_RWO


class EveryOutcome:
    """Stands where CounterNoise does. Without states it answers with the most likely outcomes."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.states: States | None = None
        self.calls = 0
        self.wanted_RW: Tensor | None = None        # None = all
        self.drawn, self.spent = set[Key](), set[Key]()     # keys other than draw 0: of this pass, of earlier ones

    def attend(self, states: States | None) -> None:
        """Begin a pass of these states."""
        self.states, self.calls, self.wanted_RW = states, 0, None

    def close(self) -> None:
        """All states have passed. What was drawn for this pass alone may not be asked again."""
        self.spent |= self.drawn
        self.drawn.clear()

    def categorical(self, p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.SAMPLE,
                    draw: int = 0) -> Tensor:
        """See CounterNoise."""
        return self._draw(p_BWV, seeds_B, positions_BW, (purpose, draw))

    def bernoulli(self, p_BW: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.ACCEPT,
                  draw: int = 0) -> Tensor:
        """See CounterNoise."""
        p_BW = p_BW.clamp(0, 1)
        return self._draw(torch.stack([p_BW, 1 - p_BW], dim=-1), seeds_B, positions_BW, (purpose, draw)) == 0

    def _draw(self, p_BWO: Tensor, seeds_B: Tensor, positions_BW: Tensor, key: Key) -> Tensor:
        if self.states is None:
            return p_BWO.argmax(-1)
        assert torch.equal(seeds_B, torch.arange(len(seeds_B))) and len(seeds_B) == len(self.states.cache_RGN)
        assert p_BWO.dtype == torch.float64 and positions_BW.shape == p_BWO.shape[:2]
        assert key not in self.spent, f"{key} was drawn in an earlier pass"
        if key[1] != 0:
            self.drawn.add(key)
        if self.calls == len(self.states.script):
            fork = self._fork(p_BWO, positions_BW, key)
            possible_RWO = fork.high_RWO > fork.low_RWO
            if bool((possible_RWO.sum(-1) > 1).any()):
                raise fork
            self.states.script.append(possible_RWO.long().argmax(-1))
        self.calls += 1
        return self.states.script[self.calls - 1]

    def _fork(self, p_RWO: Tensor, positions_RW: Tensor, key: Key) -> Fork:
        """Entries that nobody wants, or beyond the end, have outcome 0."""
        assert self.states is not None
        real_RW1 = (positions_RW < self.length)[..., None]
        if self.wanted_RW is not None:
            real_RW1 = real_RW1 & self.wanted_RW[..., None]
        first_O = F.one_hot(torch.tensor(0), p_RWO.shape[-1]).double()
        upper_RWO = torch.where(real_RW1, p_RWO, first_O).cumsum(-1).round(decimals=DECIMALS)
        assert bool(((upper_RWO[..., -1] - 1).abs() < 1e-9).all()), "a law that does not sum to 1"
        upper_RWO = torch.where(upper_RWO > 1 - 1e-12, 1.0, upper_RWO)
        known_RL2 = self.states.hidden.get(key)
        if known_RL2 is None:
            known_RL2 = untouched(len(p_RWO), self.length)
        known_RW2 = known_RL2.gather(1, positions_RW.clamp_max(self.length - 1)[..., None].expand(-1, -1, 2))
        known_RW2 = torch.where(real_RW1, known_RW2, torch.tensor([0.0, 1.0], dtype=torch.float64))
        low_RWO = torch.maximum(F.pad(upper_RWO[..., :-1], (1, 0)), known_RW2[..., :1])
        high_RWO = torch.minimum(upper_RWO, known_RW2[..., 1:])
        positions_RW = torch.where(real_RW1[..., 0], positions_RW, self.length)
        return Fork(key, self.length, positions_RW, low_RWO, high_RWO, known_RW2[..., 1] - known_RW2[..., 0])


@dataclass(frozen=True)
class WantedDrafts:
    """A draft initialisation that draws only what is wanted, and spoils the rest."""

    init: DraftInit
    noise: EveryOutcome

    def fill(self, blank: Blank) -> tuple[Tensor, Tensor | None]:
        """See DraftInit."""
        self.noise.wanted_RW = blank.positions_BW >= blank.known_B[:, None]
        codes_BW, law_BWV = self.init.fill(blank)
        wanted_RW, self.noise.wanted_RW = self.noise.wanted_RW, None
        if law_BWV is not None:
            law_BWV = law_BWV.masked_fill(~wanted_RW[..., None], torch.nan)
        return codes_BW.masked_fill(~wanted_RW, 0), law_BWV


@dataclass(frozen=True)
class Law:
    """What was found: the law of all codes (flat, first code slowest), and the expected number of passes."""

    codes_C: Tensor
    passes: float
    ends: States        # finished decodes with the number of their last pass

    def distance(self, case: Case) -> float:
        """Total variation to the chain rule."""
        return float((self.codes_C - case.chain_law).abs().sum() / 2)


class Enumeration:
    """One decoder on one case.

    Decodes whose images stand at the same positions share a batch, so that whatever a decoder derives from its whole
    batch is as in a decode by itself; `together` puts all of them into one. `history`: the window policy reads it.
    `keep`: remember the hidden numbers of final codes too.
    """

    def __init__(self, decoder: SpeculativeJacobi, case: Case, together: bool = False, history: bool = False,
                 keep: bool = False) -> None:
        self.decoder, self.case = copy(decoder), case
        self.together, self.history, self.keep = together, history, keep
        self.noise = EveryOutcome(case.length)
        self.decoder.init = WantedDrafts(decoder.init, self.noise)
        self.turn = 0

    @torch.no_grad()
    def law(self) -> Law:
        """Run all decodes to their ends."""
        images, length = len(self.case.classes), self.case.length
        codes_C = torch.zeros(self.case.vocab ** (images * length), dtype=torch.float64)
        radix = self.case.vocab ** torch.arange(images * length - 1, -1, -1)
        passes, ends = 0.0, list[States]()
        states = States(torch.ones(1, dtype=torch.float64), images, {}, torch.empty(images, 0), {}, [])
        while len(states.weight_S):
            self.turn += 1
            assert self.turn <= length, "no progress"
            parts = [self._merged(self._reduced(part)) for group in self._groups(states)
                     for part in self._explore(group)]
            self.noise.close()
            states = self._merged(cat(parts))
            done_S = (states.by_decode(states.run["fixed"]) >= length).all(1)
            finished, states = states.pick(done_S.nonzero()[:, 0]), states.pick((~done_S).nonzero()[:, 0])
            cells_S = (finished.by_decode(finished.run["codes_BN"][:, :length]) * radix).sum(1)
            codes_C.index_add_(0, cells_S, finished.weight_S)
            passes += float(finished.weight_S.sum()) * self.turn
            turn_R = torch.full_like(finished.run["fixed_B"], self.turn)
            ends.append(replace(finished, run={"codes_BN": finished.run["codes_BN"], "turn": turn_R}))
        return Law(codes_C, passes, cat(ends))

    def _groups(self, states: States) -> Iterator[States]:
        if self.together or not states.run:
            yield states
            return
        places, group_S = states.by_decode(states.run["fixed"]).unique(dim=0, return_inverse=True)
        for group in range(len(places)):
            yield states.pick((group_S == group).nonzero()[:, 0])

    def _explore(self, states: States) -> Iterator[States]:
        """All states after one pass."""
        try:
            run = self._pass(states)
        except Fork as fork:
            grown = branched(states, fork)
            for first in range(0, len(grown.weight_S), LIMIT):
                yield from self._explore(grown.pick(torch.arange(first, min(first + LIMIT, len(grown.weight_S)))))
        else:
            yield self._after(run, states)

    def _pass(self, states: States) -> Run:
        """The production loop, once."""
        images_R = torch.arange(states.images).repeat(len(states.weight_S))
        request = self.case.request(images_R, self.noise)
        target = Target(self.case.net, request)
        self.noise.attend(None if states.run else states)
        run = self.decoder.begin(target, request)
        if states.run:
            self._resume(run, states)
            self.noise.attend(states)
            self.decoder.advance(run)
        return run

    def _resume(self, run: Run, states: States) -> None:
        """Put the states into a fresh run of as many rows."""
        for name, value in states.run.items():
            if name == "passes":
                value = [Pass(widths, counts, 0.0) for widths, counts in value.permute(1, 2, 0).tolist()]
            elif name == "fixed":
                value = value.tolist()
            setattr(run, name, value.clone() if isinstance(value, Tensor) else value)
        self.case.net.cache.codes_RS = states.cache_RGN.transpose(0, 1).flatten(0, 1).clone()
        run.target.forward_passes = self.turn - 1

    def _after(self, run: Run, states: States) -> States:
        """What the pass has left."""
        assert run.target.forward_passes == self.turn
        saved: dict[str, Any] = {}
        for name in (field.name for field in fields(run) if field.name not in ("target", "request")):
            value = getattr(run, name)
            if name == "passes":
                both = [[one.widths, one.counts] for one in value]
                value = torch.tensor(both, dtype=torch.int64).reshape(-1, 2, len(run.fixed)).permute(2, 0, 1)
            saved[name] = torch.tensor(value) if name == "fixed" else value
        assert torch.equal(saved["fixed"], run.fixed_B)
        cache_RGN = self.case.net.cache.codes_RS.unflatten(0, (-1, len(run.fixed))).transpose(0, 1)
        return replace(states, run=saved, cache_RGN=cache_RGN, script=[])

    def _reduced(self, states: States) -> States:
        """Without what cannot matter any more. Laws and cached codes that no pass may use again are spoilt."""
        length, run = self.case.length, dict(states.run)
        fixed_R1, known_R1 = run["fixed_B"][:, None], run["known_B"][:, None]
        position_N = torch.arange(run["codes_BN"].shape[1])
        run["codes_BN"] = run["codes_BN"] * (position_N < known_R1.clamp_max(length))
        run["law_BV"] = run["law_BV"].masked_fill(known_R1 >= length, torch.nan)
        if run["laws_BMV"] is not None:
            slot_M = torch.arange(run["laws_BMV"].shape[1])
            used_RM = fixed_R1 + slot_M < known_R1.clamp_max(length)
            run["laws_BMV"] = run["laws_BMV"].masked_fill(~used_RM[..., None], torch.nan)
        run["fixed_at_BL"] = torch.zeros_like(run["fixed_at_BL"])
        if not self.history:
            run["passes"] = run["passes"][:, :0]
        slot_N = torch.arange(states.cache_RGN.shape[2])
        cache_RGN = states.cache_RGN.masked_fill((slot_N >= fixed_R1)[:, None], NOTHING)
        hidden = {key: value for key, value in states.hidden.items() if key[1] == 0}
        if not self.keep:
            open_RL1 = (torch.arange(length) >= fixed_R1)[..., None]
            hidden = {key: torch.where(open_RL1, value, untouched(*value.shape[:2])) for key, value in hidden.items()}
        return replace(states, run=run, cache_RGN=cache_RGN, hidden=hidden)

    def _merged(self, states: States) -> States:
        """One of all equal decodes, with their weight."""
        columns = [states.cache_RGN, *states.hidden.values(), *states.run.values()]
        signature_S = torch.zeros(len(states.weight_S), dtype=torch.int64)
        generator = torch.Generator().manual_seed(0)
        for column in (states.by_decode(column) for column in columns if column is not None):
            if column.is_floating_point():
                column = (column.nan_to_num(-1.0) * 1e12).round()
            odd = torch.randint(-2 ** 62, 2 ** 62, (column.shape[1],), generator=generator) * 2 + 1
            signature_S += (column.long() * odd).sum(1)         # int64 wraps: a random hash
        _, group_S = signature_S.unique(return_inverse=True)
        groups = int(group_S.max()) + 1
        weight = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_S, states.weight_S)
        one = torch.zeros(groups, dtype=torch.int64).scatter_(0, group_S, torch.arange(len(group_S)))
        return replace(states.pick(one), weight_S=weight)


def branched(states: States, fork: Fork) -> States:
    """Every decode once for each combination of outcomes of its draws."""
    low_SEO, high_SEO = (values.reshape(len(states.weight_S), -1, values.shape[-1])
                         for values in (fork.low_RWO, fork.high_RWO))
    possible_SEO = high_SEO > low_SEO
    order_SEO = (~possible_SEO).long().argsort(dim=-1, stable=True)         # possible outcomes first
    count_SE = possible_SEO.sum(-1)
    radix_SE = F.pad(count_SE.cumprod(1), (1, 0))
    radix_SE[:, 0] = 1
    parent_X = torch.arange(len(count_SE)).repeat_interleave(radix_SE[:, -1])
    number_X = torch.arange(len(parent_X)) - (radix_SE[:, -1].cumsum(0) - radix_SE[:, -1])[parent_X]
    digit_XE = number_X[:, None] // radix_SE[parent_X, :-1] % count_SE[parent_X]
    outcome_XE1 = order_SEO[parent_X].gather(2, digit_XE[..., None])
    low_XE, high_XE = (values[parent_X].gather(2, outcome_XE1)[..., 0] for values in (low_SEO, high_SEO))
    grown = states.pick(parent_X)
    chance_X = ((high_XE - low_XE) / states.by_decode(fork.known_RW)[parent_X]).prod(1)
    rows, width = len(grown.cache_RGN), fork.positions_RW.shape[1]
    known_RL2 = grown.hidden.get(fork.key)
    if known_RL2 is None:
        known_RL2 = untouched(rows, fork.length)
    where_RW12 = fork.positions_RW.reshape(len(count_SE), -1)[parent_X].reshape(rows, width)
    piece_RW2 = torch.stack([low_XE, high_XE], dim=-1).reshape(rows, width, 2)
    known_RN2 = F.pad(known_RL2, (0, 0, 0, 1)).scatter(1, where_RW12[..., None].expand(-1, -1, 2), piece_RW2)
    return replace(grown, weight_S=grown.weight_S * chance_X,
                   hidden={**grown.hidden, fork.key: known_RN2[:, :fork.length]},
                   script=[*grown.script, outcome_XE1[..., 0].reshape(rows, width)])
