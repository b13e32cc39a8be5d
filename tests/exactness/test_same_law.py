"""Every decoder that claims the law of plain decoding has it, exactly: all outcomes of all draws are followed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.accel.ar import PlainAR
from arimg.accel.base import Guidance, Sampling
from arimg.accel.drafts import INITS
from arimg.accel.jacobi import Jacobi, Scd, ScdGumbel, Sjd, SpeculativeJacobi
from arimg.accel.siblings import ScdSiblings
from arimg.accel.target import Target
from arimg.accel.windows import AdaptiveWindow, Pass, nominal_cost
from arimg.noise import Purpose
from tests.exactness.harness import Enumeration, Law
from tests.exactness.reference import enumerate_passes
from tests.exactness.tiny import Case

DECODERS: dict[str, Callable[..., SpeculativeJacobi]] = {
    "jacobi": Jacobi, "sjd": Sjd, "scd": Scd, "scd-gumbel": ScdGumbel, "scd-siblings": ScdSiblings}
SETTINGS = {
    "guided": Case(3, (2, 2), guidance=Guidance(3.0)),
    "controlled": Case(3, (2, 2), controlled=True),
    "three branches": Case(3, (2, 2), controlled=True, guidance=Guidance(2.0, 3.0)),
    "control first": Case(3, (2, 2), controlled=True, guidance=Guidance(2.0, 3.0, order="control-first")),
    "plausible": Case(4, (2, 2), controlled=True, guidance=Guidance(3.0, 2.0, (1, None), "control-first", 0.4)),
    "early interval": Case(3, (2, 2), controlled=True, guidance=Guidance(2.0, 3.0, (1, 3))),
    "late interval": Case(3, (1, 4), guidance=Guidance(3.0, interval=(2, None))),
    "top-k": Case(4, (2, 2), sampling=Sampling(0.8, 2)),
    "top-k, guided": Case(4, (1, 4), sampling=Sampling(1.1, 3), guidance=Guidance(1.5)),
    "top-p": Case(4, (2, 2), sampling=Sampling(1.5, 0, 0.7), seed=1),
    "forced": Case(3, (1, 5), forced=((-1, 2, -1, 0, -1),)),
    "forced ends": Case(3, (1, 4), forced=((1, -1, -1, 2),)),
    "drafts": Case(3, (2, 2), drafts=((0, 2, -1, 0),)),
    "drafts and forced": Case(3, (1, 4), drafts=((0, 1, 2, -1),), forced=((-1, 0, -1, -1),)),
}
every_decoder = pytest.mark.parametrize("name", DECODERS)


def check(decoder: SpeculativeJacobi, case: Case, **options: Any) -> Law:
    """The law, after it was found to be right."""
    law = Enumeration(decoder, case, **options).law()
    assert abs(float(law.codes_C.sum()) - 1) < 1e-12
    assert law.distance(case) < 1e-10
    assert 1 <= law.passes <= case.length + 1e-12
    return law


@every_decoder
@pytest.mark.parametrize("window", [1, 2, 3, "all"])
@pytest.mark.parametrize("case", [Case(2, (1, 5)), Case(4, (2, 2))], ids=["2 codes, 1x5", "4 codes, 2x2"])
def test_every_window(name: str, window: int | str, case: Case) -> None:
    law = check(DECODERS[name](case.length if window == "all" else int(window)), case)
    assert window != 1 or law.passes == pytest.approx(case.length)


@pytest.mark.slow
@every_decoder
@pytest.mark.parametrize("vocab, window, seed", [
    (3, 2, 0), (3, 3, 0), (3, 3, 1), (3, 5, 1), (3, 5, 2), (4, 2, 0), (4, 3, 0)])
def test_every_window_at_five_codes(name: str, vocab: int, window: int, seed: int) -> None:
    check(DECODERS[name](window), Case(vocab, (1, 5), seed=seed))


@every_decoder
@pytest.mark.parametrize("init", INITS)
def test_every_draft_initialisation(name: str, init: str) -> None:
    check(DECODERS[name](3, init), Case(3, (2, 2)))


@every_decoder
@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
def test_every_setting(name: str, case: Case) -> None:
    check(DECODERS[name](3), case)


@every_decoder
def test_a_certain_table(name: str) -> None:
    case = Case(4, (1, 5), sampling=Sampling(temperature=0.0))
    law = check(DECODERS[name](3), case)
    assert float(law.codes_C.max()) == 1


@every_decoder
def test_all_decodes_in_one_batch(name: str) -> None:
    """Rows stand at different positions, and the pass is as wide as the row that is furthest behind needs."""
    check(DECODERS[name](3), Case(3, (1, 4), controlled=True, guidance=Guidance(2.0, 3.0, (0, 2))), together=True)


@every_decoder
@pytest.mark.parametrize("window, length", [(2, 4), (3, 3), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_two_images_in_a_batch(name: str, window: int, length: int) -> None:
    """Their joint law: each image has its own, and they are independent."""
    check(DECODERS[name](window), Case(2, (1, length), classes=(0, 1), guidance=Guidance(2.0), seed=3))


def test_two_controlled_images_one_forced() -> None:
    case = Case(2, (2, 2), (1, 2), Guidance(1.5, 3.0, (1, None)), controlled=True,
                forced=((-1, -1, 1, -1), (-1, -1, -1, -1)), drafts=((-1,) * 4, (0, 1, 1, 0)))
    for decoder in (Jacobi(3), Scd(3), ScdSiblings(3)):
        check(decoder, case)


@dataclass(frozen=True)
class Wave:
    """Each row's width goes up and down with the row's own history."""

    widest: int = 3

    def widths(self, fixed: Sequence[int], passes: Sequence[Pass], length: int) -> list[int]:
        """See WindowPolicy."""
        return [1 + (5 * sum(one.counts[row] for one in passes) + 2 * len(passes) + 2) % self.widest
                for row in range(len(fixed))]


@every_decoder
def test_a_width_that_follows_the_past_of_each_row(name: str) -> None:
    check(DECODERS[name](Wave()), Case(2, (1, 5)), history=True)
    check(DECODERS[name](Wave()), Case(3, (1, 4)), history=True, together=True)
    check(DECODERS[name](Wave()), Case(2, (1, 3), classes=(0, 1)), history=True)


@every_decoder
def test_the_adaptive_window(name: str) -> None:
    seen = set[int]()

    def cost(width: int) -> float:
        return 1 + 0.1 * width

    class Watched(AdaptiveWindow):
        def widths(self, fixed: Sequence[int], passes: Sequence[Pass], length: int) -> list[int]:
            chosen = super().widths(fixed, passes, length)
            seen.update(chosen)
            return chosen
    check(DECODERS[name](Watched(cost, 4, (3,))), Case(2, (1, 6), seed=4), history=True)
    assert len(seen) >= 3
    check(DECODERS[name](AdaptiveWindow(nominal_cost, 4, (2,))), Case(2, (1, 3), classes=(0, 1)), history=True)


@pytest.mark.parametrize("siblings", [1, 3])
def test_number_of_siblings(siblings: int) -> None:
    check(ScdSiblings(3, siblings=siblings), Case(4, (2, 2), seed=1))
    check(ScdSiblings(2, "repeat-left", siblings=siblings), Case(3, (1, 4)))


@dataclass(frozen=True)
class Given:
    """Noise whose uniform numbers are given, (B, L) for each purpose."""

    numbers: dict[Purpose, Tensor]

    def categorical(self, p_BWV: Tensor, seeds_B: Tensor, positions_BW: Tensor, purpose: Purpose = Purpose.SAMPLE,
                    draw: int = 0) -> Tensor:
        """See CounterNoise."""
        numbers_BL = self.numbers[purpose]
        number_BW = numbers_BL.gather(1, positions_BW.clamp_max(numbers_BL.shape[1] - 1))
        return (p_BWV.cumsum(-1) < number_BW[..., None]).sum(-1).clamp_max(p_BWV.shape[-1] - 1)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("case", [Case(2, (1, 5)), Case(3, (2, 2), controlled=True, guidance=Guidance(2.0, 3.0))],
                         ids=["plain", "guided"])
def test_jacobi_maps_every_hidden_number_to_plain_decodings_code(init: str, case: Case) -> None:
    """Not only the law: wherever the uniform numbers behind the draws lie, the codes are plain decoding's for them. And
    the harness tells the truth: a decode with numbers from the middle of where they lie takes that many passes."""
    ends = check(Jacobi(3, init), case, keep=True).ends
    low_SL, high_SL = ends.hidden[Purpose.SAMPLE, 0].unbind(-1)
    codes_SL = ends.run["codes_BN"][:, :case.length]
    plain = {codes: case.pieces(codes) for codes in map(tuple, codes_SL.unique(dim=0).tolist())}
    pieces_SL2 = torch.tensor([plain[tuple(codes)] for codes in codes_SL.tolist()], dtype=torch.float64)
    assert bool((pieces_SL2[..., 0] <= low_SL + 1e-12).all() and (high_SL <= pieces_SL2[..., 1] + 1e-12).all())
    volume_S = torch.stack([(known.diff(dim=-1)).flatten(1).prod(1) for known in ends.hidden.values()]).prod(0)
    torch.testing.assert_close(volume_S, ends.weight_S, rtol=0, atol=1e-12)
    noise = Given({purpose: known.mean(-1) for (purpose, _), known in ends.hidden.items()})
    request = case.request(torch.zeros(len(codes_SL), dtype=torch.int64), noise)
    plain_codes = PlainAR().decode(Target(case.net, request), request).codes_BL
    result = Jacobi(3, init).decode(Target(case.net, request), request)
    assert plain_codes is not None and torch.equal(plain_codes, codes_SL)
    assert result.codes_BL is not None and torch.equal(result.codes_BL, codes_SL)
    assert [row[-1] for row in result.stats.extra["fixed_at"]] == ends.run["turn"].tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("coupled", [False, True])
def test_passes_are_those_of_the_paper(seed: int, coupled: bool) -> None:
    case = Case(3, (1, 5), seed=seed)

    def laws(prefix: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(case.law(0, prefix).tolist())
    expected, codes = enumerate_passes(laws, case.vocab, case.length, 3, coupled)
    chain = dict(zip(itertools.product(range(3), repeat=5), case.chain_law.tolist()))
    assert all(abs(codes[key] - chance) < 1e-12 for key, chance in chain.items())
    law = check((Scd if coupled else Sjd)(3, "uniform-law"), case)
    assert law.passes == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_order_of_passes() -> None:
    """What sjd.md section 5 found: knowing the drafts' law, coupling and siblings each save passes, on average."""
    decoders = (Sjd(3, "random"), Sjd(3, "uniform-law"), Scd(3, "uniform-law"), ScdSiblings(3, "uniform-law"))
    passes = [sum(Enumeration(decoder, Case(3, (1, 5), seed=seed)).law().passes for seed in range(3)) / 3
              for decoder in decoders]
    assert 5 > passes[0] > passes[1] > passes[2] > passes[3]


def test_cases_differ_where_they_should() -> None:
    """The tables are no accident: guidance, control, class and seed change the law, and all codes have a chance."""
    plain = Case(3, (2, 2))
    for other in (*list(SETTINGS.values())[:4], replace(plain, classes=(1,)), replace(plain, seed=1)):
        assert float((other.chain_law - plain.chain_law).abs().sum() / 2) > 0.05
    assert float(plain.chain_law.min()) > 1e-7
