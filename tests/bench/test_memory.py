"""Peak memory: counted from birth to death, views and weights left out."""

from __future__ import annotations

import pytest
import torch

from arimg.bench.memory import TensorBytes, peak_memory

CPU = torch.device("cpu")
KB = torch.zeros(256).nbytes


def test_the_peak_is_what_is_alive_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(256)
        second = first + 1
        del first
        return second * 2
    peak, result = peak_memory(CPU, work)
    assert peak == 2 * KB and result.shape == (256,)


def test_views_and_work_in_place_cost_nothing_and_keep_their_storage_alive() -> None:
    with TensorBytes() as counter:
        whole = torch.zeros(256)
        part = whole.view(16, 16)[:2].add_(1)
        del whole
        assert counter.now == KB == counter.peak
        del part
    assert counter.now == 0


def test_what_was_there_before_is_not_counted() -> None:
    weight = torch.zeros(256, 256)
    peak, _ = peak_memory(CPU, lambda: torch.nn.functional.linear(torch.zeros(1, 256), weight))
    assert peak == 2 * KB


def test_lists_of_results() -> None:
    peak, _ = peak_memory(CPU, lambda: torch.zeros(256).topk(256))
    assert peak == KB + KB + 2 * KB         # input, values, int64 indices


@pytest.mark.cuda
def test_cuda_resets_its_peak() -> None:
    device = torch.device("cuda")
    _ = torch.zeros(1 << 20, device=device)
    peak, _ = peak_memory(device, lambda: torch.zeros(1 << 18, device=device))
    assert peak == 1 << 20
