"""Decode steps compile without graph breaks, one graph per bucket of window widths, and wait for the device once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from arimg.accel.ar import PlainAR
from arimg.accel.base import Decoder, DecodeRequest, Guidance, Sampling
from arimg.accel.jacobi import Jacobi, Scd, SpeculativeJacobi
from arimg.accel.siblings import ScdSiblings
from arimg.accel.target import Target, filter_probs, mix
from arimg.accel.windows import BUCKETS
from arimg.inference import lay_out
from arimg.models.ar import ARTransformer
from arimg.models.base import Condition
from arimg.models.students import ARStudent
from arimg.noise import philox
from arimg.quantize import quantize
from tests.models.toy import toy_classes, toy_inject, toy_model


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model: ARTransformer, decoder: Decoder, batch: int = 2, **changes: Any) -> Tensor:
    request = DecodeRequest(toy_classes(batch), (4, 4), torch.arange(batch), toy_inject(batch), **changes)
    codes = decoder.decode(Target(model, request), request).codes_BL
    assert codes is not None
    return codes


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_one_graph_per_bucket(width: int) -> None:
    """One graph for each width that occurs: W, and the buckets below it at the image's end; the prefix has one slot and
    takes the graph of single positions."""
    model, counter = toy_model(), CompileCounter()
    plain = decode(toy_model(), PlainAR(), guidance=Guidance(cfg=2.0))
    model.compile_step(backend=counter)
    assert torch.equal(decode(model, Jacobi(width), guidance=Guidance(cfg=2.0)), plain)
    assert 1 <= counter.frame_count <= len([bucket for bucket in BUCKETS if bucket <= width])
    first = counter.frame_count
    decode(model, Jacobi(width), guidance=Guidance(cfg=2.0))
    assert counter.frame_count == first, "a second picture compiles nothing"


def test_leaves_of_a_tree_compile() -> None:
    """Passes that read scratch slots at the positions of others."""
    plain = decode(toy_model(), ScdSiblings(4), guidance=Guidance(cfg=2.0))
    model = toy_model()
    model.compile_step(backend="aot_eager")
    assert torch.equal(decode(model, ScdSiblings(4), guidance=Guidance(cfg=2.0)), plain)


@pytest.mark.parametrize("weights", ["float32", "fp16", "int8", "int4"])
def test_packed_weights_compile(weights: str) -> None:
    model = toy_model(dim=64, ffn_hidden=128, inject_layers=())
    lay_out(model if weights == "float32" else quantize(model, weights))
    plain = decode(model, PlainAR(), guidance=Guidance(cfg=2.0))
    model.compile_step(backend="aot_eager")
    assert torch.equal(decode(model, PlainAR(), guidance=Guidance(cfg=2.0)), plain)


def test_two_compiled_networks_keep_their_own_weights() -> None:
    """Packed weights are numbers in the graph, and the guards that would tell networks apart are off, as by default."""
    unchecked = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    networks = [lay_out(quantize(toy_model(seed=seed), "int8")) for seed in (0, 1, 2)]
    plain = [decode(network, PlainAR()) for network in networks]
    for network in networks:
        network.compile_step(backend="eager", options=unchecked)
    for network, codes in zip(networks, plain):
        assert torch.equal(decode(network, PlainAR()), codes)
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])


def test_one_graph_for_a_students_pass() -> None:
    student, counter = ARStudent.from_teacher(toy_model(), 8), CompileCounter()
    inputs = torch.randn(2, 16, 8), torch.zeros(2, dtype=torch.int64), toy_classes(2), (4, 4)
    with torch.no_grad():
        plain = student.features(*inputs)
        student.compile_pass(backend=counter)
        torch.testing.assert_close(student.features(*inputs), plain)
        assert counter.frame_count == 1
        student.features(*inputs)
    assert counter.frame_count == 1, "a second picture compiles nothing"


def test_laws_and_draws_compile_whole() -> None:
    """What a pass does after the layers: mixing, filters, the draw."""
    request = DecodeRequest(toy_classes(2), (4, 4), torch.arange(2))
    target = Target(toy_model(), request)

    def tail(logits_GBWV: Tensor, positions_BW: Tensor) -> Tensor:
        mixed_BWV = mix(logits_GBWV, {"full": 2.0, "null": 1.0})
        return target.draw(filter_probs(mixed_BWV, Sampling(0.9, 20, 0.9)), positions_BW)

    counter = CompileCounter()
    compiled = torch.compile(tail, fullgraph=True, dynamic=False, backend=counter)
    for width in (1, 4, 16):
        logits, positions = torch.randn(2, 2, width, 32), torch.arange(width).expand(2, -1)
        assert torch.equal(compiled(logits, positions), tail(logits, positions))
    assert counter.frame_count == 3


@pytest.mark.slow
def test_compiled_code_paints_the_same_codes() -> None:
    model = toy_model(layers=2, inject_layers=(0, 1)).double()
    request = DecodeRequest(toy_classes(2), (4, 4), torch.arange(2), toy_inject(2, points=2).double())
    plain = PlainAR().decode(Target(model, request), request).codes_BL
    model.compile_step()
    for decoder in (PlainAR(), Jacobi(4)):
        codes = decoder.decode(Target(model, request), request).codes_BL
        assert codes is not None and plain is not None and torch.equal(codes, plain)


class CountSyncs(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.waits += any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique",
                                                    "aten.equal", "_to_copy.cpu", "index.Tensor_mask"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder", [Jacobi(4), Scd(4), ScdSiblings(4)], ids=lambda one: type(one).__name__)
def test_a_pass_waits_for_the_device_once(decoder: SpeculativeJacobi, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, tolist = [0], Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        waits[0] += 1
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    make, made = torch.tensor, [0]

    def copied(*args: Any, **options: Any) -> Tensor:
        made[0] += 1
        return make(*args, **options)

    monkeypatch.setattr("arimg.accel.jacobi.to_device", lambda numbers, device: make(numbers, device=device))
    monkeypatch.setattr(torch, "tensor", copied)
    request = DecodeRequest(toy_classes(3), (4, 4), torch.arange(3), toy_inject(3),
                            guidance=Guidance(cfg=3.0, control_cfg=2.0, interval=(2, 8)),
                            sampling=Sampling(0.9, 20, 0.9), forced_BL=torch.full((3, 16), -1))
    run = decoder.begin(Target(toy_model(), request), request)
    while not run.done:
        before = waits[0]
        with CountSyncs() as syncs:
            decoder.advance(run)
        assert (waits[0] - before, syncs.waits, made[0]) == (1, 0, 0)


def test_noise_is_made_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [torch.arange(2), torch.arange(2, 4), torch.arange(4, 6)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", None)        # a copy from the host, for which a device would wait
        words = philox(*pairs)
    assert all((ours.numpy() == theirs).all() for ours, theirs in zip(words, philox(*(one.numpy() for one in pairs))))


@pytest.mark.cuda
@pytest.mark.parametrize("decoder", [Jacobi(4), Scd(4)], ids=lambda one: type(one).__name__)
def test_cuda_waits_once_and_paints_the_codes_of_plain_decoding(decoder: SpeculativeJacobi) -> None:
    condition, model = Condition(class_ids_B=torch.arange(3, device="cuda")), toy_model().double().cuda()
    request = DecodeRequest(condition, (4, 4), torch.arange(3, device="cuda"), guidance=Guidance(cfg=3.0))
    run = decoder.begin(Target(model, request), request)
    while not run.done:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            decoder.advance(run)
            torch.cuda.set_sync_debug_mode("default")
        assert sum("synchroniz" in str(one.message) for one in caught) == 1
    plain = PlainAR().decode(Target(model, request), request).codes_BL
    assert plain is not None and (decoder.guarantee != "same-codes" or torch.equal(run.codes_BN[:, :16], plain))
