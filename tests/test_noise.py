"""Counter-based noise: the published words, in numpy and in torch, and what a draw depends on."""

from __future__ import annotations

import pytest
import torch

from arimg import noise
from arimg.kernels import build_error
from arimg.noise import CounterNoise, Purpose, largest, philox

KNOWN = {       # philox4x32-10 in the known-answer file of Random123: counter, key, words
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str, kind: str) -> None:
    counter, key, words = (torch.tensor([int(word, 16) for word in text.split()]) for text in KNOWN[name])
    inputs = [counter[0::2].view(2, 1), counter[1::2].view(2, 1), key.view(2, 1)]
    even, odd = philox(*([one.numpy() for one in inputs] if kind == "numpy" else inputs))
    assert [word.item() for word in (even[0], odd[0], even[1], odd[1])] == words.tolist()


def test_a_word_is_a_function_of_seed_position_purpose_draw_and_index() -> None:
    noise, positions_BW = CounterNoise(), torch.tensor([[0, 5, 9], [7, 5, 2]])
    seeds_B = torch.tensor([3, (1 << 40) + 3])
    words_BWN = noise.words(seeds_B, positions_BW, 10, Purpose.DRAFT, draw=2)
    assert words_BWN.shape == (2, 3, 10) and 0 <= int(words_BWN.min()) and int(words_BWN.max()) < 1 << 32
    alone = noise.words(seeds_B[1:], positions_BW[1:, 1:2], 3, Purpose.DRAFT, draw=2)
    assert torch.equal(alone[0, 0], words_BWN[1, 1, :3])
    others = [noise.words(seeds_B[:1], positions_BW[1:, 1:2], 3, Purpose.DRAFT, draw=2),
              noise.words(seeds_B[1:], positions_BW[:1, :1], 3, Purpose.DRAFT, draw=2),
              noise.words(seeds_B[1:], positions_BW[1:, 1:2], 3, Purpose.ACCEPT, draw=2),
              noise.words(seeds_B[1:], positions_BW[1:, 1:2], 3, Purpose.DRAFT)]
    assert not any(torch.equal(alone, other) for other in others)


def test_laws() -> None:
    noise, seeds_B, positions_BW = CounterNoise(), torch.arange(4), torch.arange(250).expand(4, -1)
    uniform = noise.uniform(seeds_B, positions_BW, 100, Purpose.SAMPLE)
    assert 0 < float(uniform.min()) and float(uniform.max()) <= 1 and abs(float(uniform.mean()) - 0.5) < 5e-3
    gumbel = noise.gumbel(seeds_B, positions_BW, 100)
    assert abs(float(gumbel.mean()) - 0.57722) < 0.02 and abs(float(gumbel.var()) - 1.64493) < 0.05
    normal = noise.normal(seeds_B, positions_BW, 100, Purpose.FLOW)
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.var()) - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_largest_is_the_first_of_equals(dtype: torch.dtype) -> None:
    values = torch.randint(0, 9, (3, 4, 50)).to(dtype).transpose(0, 1)
    found = largest(values)
    assert found.shape == (4, 3) and found.dtype == torch.int64
    assert torch.equal(values.gather(-1, found[..., None])[..., 0], values.amax(-1))
    if dtype != torch.bfloat16:
        assert torch.equal(found, (values == values.amax(-1, keepdim=True)).byte().argmax(-1))
    assert largest(values[0, 0]).shape == ()


@pytest.mark.parametrize("codes", [1, 7, 100, 1030])
def test_the_kernel_draws_the_same_codes(codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, ties, a law that is not a number, and what broadcasts included."""
    if reason := build_error("draw"):
        pytest.skip(f"the kernel cannot be built here: {reason}")
    generator = torch.Generator().manual_seed(codes)
    seeds_B = torch.randint(-2 ** 62, 2 ** 62, (3,), generator=generator)
    positions_BW = torch.randint(300, (3, 40), generator=generator)
    p_BWV = torch.randn(3, 40, codes, generator=generator).mul(3).softmax(-1)
    p_BWV[0, 0] = 0
    p_BWV[1, :20, :codes // 2] = 0
    p_BWV[2, 0, codes // 2:] = float("nan")
    given = [(p_BWV, seeds_B, positions_BW), (p_BWV[:1, :1], seeds_B, positions_BW),
             (p_BWV, seeds_B[:1], positions_BW[:1])]
    drawn = [CounterNoise().categorical(*one, Purpose.DRAFT, 5) for one in given]
    monkeypatch.setattr(noise, "is_ready", lambda name: False)
    for codes_BW, one in zip(drawn, given):
        assert torch.equal(codes_BW, CounterNoise().categorical(*one, Purpose.DRAFT, 5))
