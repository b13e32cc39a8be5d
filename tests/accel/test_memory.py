"""Decoding keeps nothing from call to call, never copies the cache, and needs memory in proportion to the batch."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, Guidance
from arimg.accel.jacobi import Jacobi, Scd
from arimg.accel.rows import ZipAR
from arimg.accel.siblings import ScdSiblings
from arimg.accel.target import Target
from arimg.bench.memory import peak_memory
from tests.models.toy import toy_classes, toy_inject, toy_model
from tests.toy import toy_pipeline

DECODERS = [PlainAR(), Jacobi(8), Scd(8), ScdSiblings(8), ZipAR(3)]


@pytest.mark.parametrize("decoder", ["jacobi", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ar", "scd"))])
def test_fifty_calls_do_not_grow_memory(decoder: str) -> None:
    pipe, process = toy_pipeline(), psutil.Process()

    def resident(calls: int) -> int:
        for seed in range(calls):
            pipe(class_id=1, decoder=decoder, seed=seed, n=2)
        gc.collect()
        resident_bytes: int = process.memory_info().rss
        return resident_bytes

    first = resident(15)
    tensors = live_tensors()
    assert resident(50) - first < 8 << 20
    assert live_tensors() <= tensors


def live_tensors() -> int:
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor with a storage of its own that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda one: type(one).__name__)
def test_no_pass_makes_anything_as_large_as_one_layer_of_the_cache(decoder: Decoder) -> None:
    grid, batch, model = (16, 32), 2, toy_model(rope_grid="true", vocab_size=8)
    request = DecodeRequest(toy_classes(batch), grid, torch.arange(batch), toy_inject(batch, 512),
                            Guidance(cfg=2.0, control_cfg=1.5))
    target = Target(model, request)
    target.start(4)
    layer = target._cache.keys[0].nbytes
    steps = [(torch.zeros(batch, width, dtype=torch.int64), torch.arange(first, first + width).expand(batch, -1))
             for first, width in ((0, 1), (1, 8), (9, 8))]
    with Largest() as largest:
        for codes, positions in steps:
            target.step(codes, positions, stop=int(positions.max()) + 1, leaves=1 if codes.shape[1] > 1 else 0)
    assert 0 < largest.bytes < layer
    with Largest() as largest:
        decoder.decode(Target(model, request), request)
    injected = request.inject_KBLD
    assert injected is not None and largest.bytes <= max(layer, injected.nbytes // 512 * 513)


@pytest.mark.parametrize("decoder", [PlainAR(), Jacobi(16), Scd(16)], ids=lambda one: type(one).__name__)
def test_peak_memory_grows_linearly_with_the_batch(decoder: Decoder) -> None:
    """Bytes of all tensors alive at once; the part that does not depend on the batch cancels."""
    model = toy_model(rope_grid="true", inject_layers=())

    def peak(batch: int) -> int:
        request = DecodeRequest(toy_classes(batch), (6, 6), torch.zeros(batch, dtype=torch.int64))
        return peak_memory(torch.device("cpu"), lambda: decoder.decode(Target(model, request), request))[0]

    peaks = [peak(batch) for batch in (8, 16, 32)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.03)
