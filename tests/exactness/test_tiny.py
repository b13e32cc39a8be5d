"""The harness's own tools."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arimg.accel.acceptance import Draws, RatioTest, Verdict, Window
from arimg.accel.ar import PlainAR
from arimg.accel.base import Guidance
from arimg.accel.jacobi import SpeculativeJacobi
from arimg.accel.target import Target
from arimg.noise import CounterNoise, Purpose
from tests.exactness.harness import Enumeration, EveryOutcome, Fork, States, branched
from tests.exactness.tiny import Case, TableCache, TableNet


def read(net: TableNet, cache: TableCache, codes: list[int], slots: list[int]) -> torch.Tensor:
    return net.step(net.embed(torch.tensor([codes]), torch.tensor([slots])), torch.tensor([slots]), cache)


def fresh(net: TableNet) -> TableCache:
    cache = net.new_cache(1, 1 + net.length, (1, net.length))
    net.step(torch.tensor([[[2.0]]], dtype=torch.float64), torch.tensor([[0]]), cache)
    return cache


def test_the_net_sees_all_codes_before_and_a_later_write_replaces_an_earlier_one() -> None:
    net = TableNet(vocab=3, length=4, seed=0)
    cache = fresh(net)
    first = read(net, cache, [1, 2, 0], [1, 2, 3])
    for slot, prefix in ((1, [1]), (2, [1, 2]), (3, [1, 2, 0])):
        row = sum(code * 3 ** i for i, code in enumerate(prefix))
        assert torch.equal(first[0, slot - 1], net.table_CLPV[2, slot, row])
    assert torch.equal(read(net, cache, [0], [3])[0, 0], first[0, 2])
    read(net, cache, [0], [1])
    assert not torch.equal(read(net, cache, [0], [3])[0, 0], first[0, 2])


def test_the_net_refuses_what_the_contract_forbids() -> None:
    net = TableNet(vocab=3, length=4, seed=0)
    with pytest.raises(AssertionError, match="never written"):
        read(net, fresh(net), [1], [2])
    limited = fresh(net)
    limited.limit(2)
    with pytest.raises(AssertionError, match="limit"):
        read(net, limited, [1, 1], [1, 2])


@torch.no_grad()
def test_the_chain_rule_is_that_of_plain_decoding() -> None:
    case = Case(3, (2, 2), classes=(1,), controlled=True, guidance=Guidance(2.0, 3.0, (1, 3)))
    request = case.request(torch.zeros(500, dtype=torch.int64), CounterNoise())
    codes = PlainAR().decode(Target(case.net, request), request).codes_BL
    assert codes is not None
    for row, draws in enumerate(codes[:50].tolist()):
        noise = CounterNoise().gumbel(torch.tensor([row]), torch.arange(4)[None], 3)[0]
        for token, code in enumerate(draws):
            assert int((case.law(0, tuple(draws[:token])).log() + noise[token]).argmax()) == code


def states(rows: int) -> States:
    return States(torch.ones(rows, dtype=torch.float64), 1, {}, torch.empty(rows, 0), {}, [])


def test_outcomes_are_pieces_of_what_is_known() -> None:
    noise, at = EveryOutcome(length=2), torch.tensor([[0, 2]])
    noise.attend(states(1))
    law = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    with pytest.raises(Fork) as first:
        noise.categorical(law, torch.tensor([0]), at)
    assert first.value.low_RWO[0].tolist() == [[0, 0.25], [0, 1]]          # position 2 lies beyond the end
    assert first.value.high_RWO[0].tolist() == [[0.25, 1], [1, 1]]
    noise.attend(states(1))
    assert noise.states is not None
    noise.states.hidden[Purpose.SAMPLE, 0] = torch.tensor([[[0.25, 1], [0, 1]]], dtype=torch.float64)
    assert noise.categorical(law, torch.tensor([0]), at).tolist() == [[1, 0]]


def test_a_draw_that_nobody_wants_leaves_its_number_alone() -> None:
    noise, at = EveryOutcome(length=2), torch.tensor([[0, 1]])
    known, law = torch.tensor([[[0.5, 1], [0, 1]]], dtype=torch.float64), torch.full((1, 2, 2), 0.5).double()
    noise.attend(replace(states(1), hidden={(Purpose.SAMPLE, 0): known}))
    noise.wanted_RW = torch.tensor([[False, True]])
    assert noise.states is not None
    with pytest.raises(Fork) as drawn:
        noise.categorical(law, torch.tensor([0]), at)
    after = branched(noise.states, drawn.value)
    assert after.hidden[Purpose.SAMPLE, 0].tolist() == [[[0.5, 1], [0, 0.5]], [[0.5, 1], [0.5, 1]]]
    assert after.weight_S.tolist() == [0.5, 0.5] and after.script[0].tolist() == [[0, 0], [0, 1]]


class YesterdaysNoise(RatioTest):
    """Asks again for the noise of an earlier pass."""

    def judge(self, window: Window, draws: Draws) -> Verdict:
        return super().judge(window, Draws(draws.request, draws.positions_BW, 2))


def test_noise_of_an_earlier_pass_is_refused() -> None:
    with pytest.raises(AssertionError, match="earlier pass"):
        Enumeration(SpeculativeJacobi(YesterdaysNoise("max"), 2, "carry-law"), Case(2, (1, 4))).law()
