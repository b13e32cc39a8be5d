"""The attention kernel: sdpa's results, and a query's bits whatever else is asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arimg.accel.jacobi import Jacobi
from arimg.kernels import build_error
from arimg.kernels.attention import exact_attention
from arimg.models import layers
from arimg.models.ar import ARTransformer
from arimg.models.layers import attention
from arimg.pipeline import Pipeline, promise
from arimg.quantize import quantize
from tests.models.toy import logits_by_steps, toy_classes, toy_codes, toy_inject, toy_model

SHAPES = [(2, 4, 1, 70, 64), (1, 2, 9, 9, 32), (2, 4, 5, 33, 20), (1, 2, 17, 40, 144), (3, 2, 4, 1, 8)]    # R H W S E


@pytest.fixture(autouse=True)
def _kernel() -> Iterator[None]:
    if reason := build_error("attention"):
        pytest.skip(f"the kernel cannot be built here: {reason}")
    with torch.no_grad():
        yield


def tensors(rows: int, heads: int, width: int, slots: int, size: int, groups: int = 1) -> tuple[Tensor, ...]:
    """q, k, v with the strides they have in a pass, and a mask under which each query sees something."""
    random = torch.Generator().manual_seed(width)
    q = torch.randn(rows, width, 3 * heads, size, generator=random)[:, :, :heads].transpose(1, 2)
    k, v = (torch.randn(rows, heads // groups, slots + 7, size, generator=random)[:, :, :slots] for _ in range(2))
    mask = torch.rand(rows, 1, width, slots, generator=random) < 0.6
    mask[..., :1] = True
    return q, k, v, mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_sdpa(shape: tuple[int, ...], groups: int) -> None:
    q, k, v, mask = tensors(*shape, groups=groups)
    wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)
    torch.testing.assert_close(exact_attention(q, k, v, mask), expected, rtol=1e-5, atol=2e-6)
    halves = [x.bfloat16() for x in (k, v)]
    wide = [x.float().repeat_interleave(groups, 1) for x in halves]
    torch.testing.assert_close(exact_attention(q, *halves, mask),
                               F.scaled_dot_product_attention(q, *wide, attn_mask=mask), rtol=1e-5, atol=2e-6)


def test_without_a_mask_it_is_causal() -> None:
    q, k, v, _ = tensors(2, 4, 37, 37, 32)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(exact_attention(q, k, v, None), expected, rtol=1e-5, atol=2e-6)


def test_masks_broadcast() -> None:
    q, k, v, mask = tensors(2, 4, 3, 9, 32)
    for given in (None, mask[:1], mask[:, :, :1], mask[:1, :, :1]):
        torch.testing.assert_close(attention(q, k, v, given, backend="exact"), attention(q, k, v, given),
                                   rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_gets_the_same_bits_in_any_company(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Alone, with others, on one thread, with more slots behind those that it sees."""
    q, k, v, mask = tensors(*shape)
    k, v = k.to(dtype), v.to(dtype)
    together = exact_attention(q, k, v, mask)
    alone = [exact_attention(q[:, :, w:w + 1], k, v, mask[:, :, w:w + 1]) for w in range(q.shape[2])]
    assert torch.equal(torch.cat(alone, 2), together)
    longer = [F.pad(x, (0, 0, 0, 21), value=5) for x in (k, v)]
    assert torch.equal(exact_attention(q, *longer, F.pad(mask, (0, 21))), together)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(exact_attention(q, k, v, mask), together)
    finally:
        torch.set_num_threads(threads)


def test_wide_scores_do_not_overflow() -> None:
    q, k, v, mask = tensors(1, 2, 3, 20, 16)
    out = exact_attention(1e4 * q, k, v, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(1e4 * q, k, v, attn_mask=mask))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda x: x.double(), "it computes in float32"), (lambda x: x.requires_grad_(), "it has no gradient")])
def test_what_it_cannot_do_sdpa_does(change: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    layers._warn_once.cache_clear()
    q, k, v, mask = (change(x) if x.is_floating_point() else x for x in tensors(1, 2, 3, 8, 16))
    with torch.enable_grad(), caplog.at_level(logging.WARNING, logger="arimg"):
        assert torch.equal(attention(q, k, v, mask, backend="exact"), attention(q, k, v, mask))
    assert [record.getMessage() for record in caplog.records] == [f"attention backend exact: {reason}; using sdpa"]


def small_model(name: str) -> ARTransformer:
    model = quantize(toy_model(dim=64, ffn_hidden=128, kv_heads=2), name)
    assert isinstance(model, ARTransformer)
    return model


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_passes_of_a_quantised_network_have_the_same_laws(name: str) -> None:
    """Bit by bit, whatever their width, under control."""
    model, codes, condition = small_model(name), toy_codes(2), toy_classes(2)
    assert model.exact and promise(Jacobi(8), model) == "same-codes"
    inject = toy_inject(2).repeat(1, 1, 1, 2)
    expected = logits_by_steps(model, condition, codes, (4, 4), inject)
    for width in (3, 5, 15):
        cache = model.new_cache(2, 17, (4, 4))
        slots = torch.arange(16).expand(2, -1)
        x = torch.cat([model.prefix(condition), model.embed(codes[:, :-1], slots[:, 1:])], dim=1)
        got = [model.predict(x[:, a:a + width], slots[:, a:a + width], cache, inject[:, :, a:a + width])
               for a in range(0, 16, width)]
        assert torch.equal(torch.cat(got, 1), expected)


def test_sixteen_bits_of_keys_hardly_matter() -> None:
    model, codes, condition = small_model("int8"), toy_codes(2), toy_classes(2)
    small = logits_by_steps(model, condition, codes, (4, 4)).log_softmax(-1)
    model.kv_dtype = None
    full = logits_by_steps(model, condition, codes, (4, 4)).log_softmax(-1)
    assert 0 < float((small - full).abs().max()) < 0.5


@pytest.mark.slow
def test_jacobi_paints_the_codes_of_plain_decoding_under_control() -> None:
    pipe = Pipeline.from_pretrained("emoji", device="cpu", dtype="float32", quantize="int8")
    size = pipe.settings.size[0]
    lines = torch.ones(3, size, size)
    lines[:, 30:32, 20:100] = lines[:, 20:100, 60:62] = 0
    plain, fast = (pipe(lines, control_type="canny", seed=0, n=4, decoder=name).codes for name in ("ar", "jacobi"))
    assert torch.equal(plain, fast)


def test_without_the_kernel_the_promise_is_weaker(monkeypatch: pytest.MonkeyPatch,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("arimg.quantize.build_error", lambda name: "no C++ compiler")
    with caplog.at_level(logging.WARNING, logger="arimg"):
        model = small_model("int8")
    assert promise(Jacobi(8), model) == "tolerance" and model.attention_backend == "sdpa"
    assert "the kernel for attention does not run here (no C++ compiler)" in caplog.text
    assert model.kv_dtype is None
