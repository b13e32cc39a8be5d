from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from arimg.errors import UnknownNameError
from arimg.models import layers
from arimg.models.layers import Cache, RMSNorm, SwiGLU, attention, rotary_table_2d, rotate


def qkv(heads: int = 4, groups: int = 4, queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 8.0]) / 12.5 ** 0.5)


def test_rms_norm_computes_halves_in_float32_and_keeps_float64() -> None:
    norm = RMSNorm(4, eps=0.0)
    big = torch.full((4,), 300.0, dtype=torch.float16)              # its square overflows float16
    assert torch.equal(norm.half()(big), torch.ones(4, dtype=torch.float16))
    x = torch.tensor([1.0, 2.0, 3.0, 1e-9], dtype=torch.float64)
    expected = x / x.square().mean().sqrt()
    torch.testing.assert_close(norm.double()(x), expected, rtol=1e-15, atol=0)


def test_swiglu_by_hand() -> None:
    ffn = SwiGLU(1, 1, dropout=0.0)
    for linear, value in ((ffn.w1, 2.0), (ffn.w3, 3.0), (ffn.w2, 5.0)):
        linear.weight.data.fill_(value)
    x = torch.tensor([1.0])
    torch.testing.assert_close(ffn(x), 5 * (2 * torch.sigmoid(torch.tensor([2.0])) * 3))


def test_rotary_angles_by_hand() -> None:
    table = rotary_table_2d(torch.arange(6), width=3, head_dim=8, base=100.0, prefix=0, identity=False)
    row, column = 1, 2                                                # cell 5 of a grid 3 wide
    angles = torch.tensor([row * 1.0, row * 0.1, column * 1.0, column * 0.1])
    torch.testing.assert_close(table[5], torch.stack([angles.cos(), angles.sin()], dim=-1))


def test_rotate_turns_interleaved_pairs() -> None:
    quarter = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2)             # cos 0, sin 1 for both pairs
    assert torch.equal(rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), quarter).flatten(),
                       torch.tensor([-2.0, 1.0, -4.0, 3.0]))


def test_rotary_scores_depend_on_offsets_only() -> None:
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = rotary_table_2d(torch.arange(30), width=6, head_dim=16, base=10000.0, prefix=0, identity=False)

    def score(a: int, b: int) -> Tensor:
        return rotate(q.view(1, 1, 1, 16), table[None, a:a + 1]).flatten() @ rotate(
            k.view(1, 1, 1, 16), table[None, b:b + 1]).flatten()
    torch.testing.assert_close(score(1 * 6 + 1, 2 * 6 + 4), score(3 * 6 + 2, 4 * 6 + 5), rtol=0, atol=1e-5)
    assert (score(1 * 6 + 1, 2 * 6 + 4) - score(1 * 6 + 1, 4 * 6 + 2)).abs() > 1e-2


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_attention_against_the_formula(backend: str, groups: int) -> None:
    q, k, v = qkv(groups=groups)
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    got = attention(q, k, v, mask, backend=backend)
    for row in range(2):
        for head in range(4):
            group = head // (4 // groups)
            scores = q[row, head] @ k[row, group].T / 8 ** 0.5
            weights = scores.masked_fill(~mask[row, 0], float("-inf")).softmax(-1)
            torch.testing.assert_close(got[row, head], weights @ v[row, group])


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_causal_equals_the_triangle(backend: str) -> None:
    q, k, v = qkv()
    triangle = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, causal=True, backend=backend),
                               attention(q, k, v, triangle, backend=backend))


def test_math_keeps_float64() -> None:
    q, k, v = (x.double() for x in qkv())
    torch.testing.assert_close(attention(q, k, v, backend="math"), attention(q, k, v), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["flex", "xformers"])
def test_backend_that_cannot_run_falls_back_with_one_warning(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    layers._warn_once.cache_clear()
    q, k, v = qkv()
    with caplog.at_level(logging.WARNING, logger="arimg"):
        for _ in range(3):
            assert torch.equal(attention(q, k, v, causal=True, backend=backend), attention(q, k, v, causal=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"attention backend {backend}: it needs a CUDA device, the tensors are on cpu; using sdpa"]


def test_unknown_backend_suggests() -> None:
    with pytest.raises(UnknownNameError, match="unknown attention backend 'sdp'; did you mean sdpa"):
        attention(*qkv(), backend="sdp")


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["flex", "xformers"])
@pytest.mark.parametrize("causal", [True, False])
def test_cuda_backends_equal_sdpa(backend: str, causal: bool) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers")
    q, k, v = (x.repeat(1, 1, 4, 4).cuda() for x in qkv(queries=16, keys=16))
    mask = None if causal else torch.ones(64, 64, dtype=torch.bool, device="cuda").triu(-3)
    torch.testing.assert_close(attention(q, k, v, mask, causal, backend), attention(q, k, v, mask, causal),
                               rtol=1e-2, atol=1e-2)


def empty_cache(rows: int = 2, slots: int = 200) -> Cache:
    return Cache(torch.zeros(slots, 2, 2), torch.ones(rows, slots, dtype=torch.bool),
                 torch.zeros(rows, slots, dtype=torch.bool), [torch.zeros(rows, 1, slots, 4)],
                 [torch.zeros(rows, 1, slots, 4)])


def test_cache_reads_no_unwritten_tail() -> None:
    cache = empty_cache()
    for slot, extent in ((0, 64), (63, 64), (64, 128), (199, 200)):
        cache.reach = slot
        window = cache.open(torch.full((2, 1), slot))
        assert window.mask_R1WS is not None and window.mask_R1WS.shape == (2, 1, 1, extent)
        keys, _ = window.exchange(0, torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
        assert keys.shape == (2, 1, extent, 4)


def test_cache_sees_written_slots_up_to_its_own() -> None:
    cache = empty_cache(rows=1, slots=6)
    cache.open(torch.tensor([[0, 1, 2]]))
    mask = cache.open(torch.tensor([[1, 2]])).mask_R1WS     # slot 2 is read again, slot 3 was never written
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_cache_mask_of_the_pass_replaces_the_rule_inside_it() -> None:
    cache = empty_cache(rows=1, slots=5)
    cache.open(torch.tensor([[0, 1]]))
    inside = torch.tensor([[[True, False], [False, True]]])     # two siblings that do not see each other
    mask = cache.open(torch.tensor([[2, 3]]), inside).mask_R1WS
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]
