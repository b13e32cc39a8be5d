"""Speculative Jacobi decoding from the paper's text, in plain Python: the expected number of passes and the law of the
codes, by recursion over (final codes, drafts with their laws). One image, new drafts uniform and known to be so."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache

Weights = tuple[float, ...]
Draft = tuple[int, Weights]         # a code and the law it was drawn from
Laws = Callable[[tuple[int, ...]], Weights]


def rest(p: Weights, q: Weights) -> Weights:
    """norm(max(0, p - q)); all zero where q covers p."""
    over = [max(0.0, a - b) for a, b in zip(p, q)]
    return tuple(a / sum(over) if sum(over) > 1e-15 else 0.0 for a in over)


def judged(laws: Laws, prefix: tuple[int, ...], drafts: tuple[Draft, ...], slots: int, coupled: bool
           ) -> Iterator[tuple[float, tuple[int, ...], tuple[Draft, ...]]]:
    """All outcomes of a pass over `slots` positions: weight, codes that became final, drafts for later."""
    codes = tuple(code for code, _ in drafts)
    p = [laws(prefix + codes[:slot]) for slot in range(slots)]

    def walk(slot: int, weight: float, chosen: tuple[int, ...], final: int | None
             ) -> Iterator[tuple[float, tuple[int, ...], tuple[Draft, ...]]]:
        if weight == 0:
            return
        if slot == slots:
            count = slots if final is None else final
            yield weight, chosen[:count], tuple(zip(chosen[count:], p[count:]))
        elif slot == len(drafts):               # no draft here: p itself
            for code, chance in enumerate(p[slot]):
                yield from walk(slot + 1, weight * chance, chosen + (code,), slots if final is None else final)
        elif final is None or coupled:
            code, q = drafts[slot]
            keep = min(1.0, p[slot][code] / q[code])
            yield from walk(slot + 1, weight * keep, chosen + (code,), final)
            for other, chance in enumerate(rest(p[slot], q)):
                yield from walk(slot + 1, weight * (1 - keep) * chance, chosen + (other,),
                                slot + 1 if final is None else final)
        else:
            for code, chance in enumerate(p[slot]):
                yield from walk(slot + 1, weight * chance, chosen + (code,), final)
    return walk(0, 1.0, (), None)


def enumerate_passes(laws: Laws, vocab: int, length: int, window: int, coupled: bool
                     ) -> tuple[float, dict[tuple[int, ...], float]]:
    """Expected passes, the one that reads the prefix included, and the law of the codes."""
    uniform = (1 / vocab,) * vocab

    @cache
    def onwards(prefix: tuple[int, ...], drafts: tuple[Draft, ...]) -> tuple[float, dict[tuple[int, ...], float]]:
        if len(prefix) == length:
            return 0.0, {prefix: 1.0}
        slots, passes, found = min(window, length - len(prefix)), 1.0, defaultdict[tuple[int, ...], float](float)
        drafts = drafts[:slots - 1]
        missing = slots - 1 - len(drafts)
        for new in itertools.product(range(vocab), repeat=missing):
            all_drafts = drafts + tuple((code, uniform) for code in new)
            for weight, final, later in judged(laws, prefix, all_drafts, slots, coupled):
                weight *= vocab ** -missing
                rest_passes, rest_codes = onwards(prefix + final, later)
                passes += weight * rest_passes
                for codes, chance in rest_codes.items():
                    found[codes] += weight * chance
        return passes, dict(found)
    total, law = 1.0, defaultdict[tuple[int, ...], float](float)
    for code, chance in enumerate(laws(())):
        passes, codes = onwards((code,), ())
        total += chance * passes
        for all_codes, weight in codes.items():
            law[all_codes] += chance * weight
    return total, dict(law)
