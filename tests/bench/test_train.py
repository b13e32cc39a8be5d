"""`arimg bench train`: the real training step under clocks. No test asserts a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from arimg.bench.machine import GEMM_SIDE, GemmClock, count_flops, markdown_table
from arimg.bench.train import PHASES, TrainReport, bench_train, to_markdown
from arimg.errors import InputError
from arimg.tokenizers.vq import VQConfig
from arimg.train.data_config import CropConfig, DataConfig
from arimg.train.run import LoopConfig, OptimConfig
from arimg.train.tokenizer import TokenizerRun
from tests.train.toy_emoji import write_toy_emoji


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARIMG_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def config(home: Path) -> TokenizerRun:
    folder = write_toy_emoji(home / "data" / "toy")
    return TokenizerRun(objective="tokenizer", name="toy", revive_every=2,
                        data=DataConfig(folder=str(folder), batch_size=2, crop=CropConfig("window", 8)),
                        optim=OptimConfig(steps=10, warmup_steps=1), train=LoopConfig(),
                        model=VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1),
                                       res_blocks=1, z_channels=8))


@pytest.fixture(scope="module")
def report(config: TokenizerRun) -> TrainReport:
    return bench_train(config, steps=2)


def test_the_phases_make_up_the_step(report: TrainReport) -> None:
    times, = report.networks
    assert times.network == "plain" and tuple(times.seconds) == PHASES
    assert all(seconds > 0 for seconds in times.seconds.values())
    assert times.images_per_second == pytest.approx(2 / times.step)
    through = times.seconds["forward"] + times.seconds["backward"]
    rate = report.step_flops / through / report.gemm_flops_per_second["float32"]
    assert times.gemm_share == pytest.approx(rate, rel=0.5)        # a median of sums is not the sum of medians


def test_a_step_counts_all_its_micro_batches(config: TokenizerRun, report: TrainReport) -> None:
    twice = bench_train(replace(config, train=LoopConfig(accumulation=2)), steps=1)
    assert twice.batch_size == 4 and twice.step_flops == 2 * report.step_flops
    assert twice.networks[0].images_per_second == pytest.approx(4 / twice.networks[0].step)


def test_operators_are_sorted_and_named_in_the_verdict(report: TrainReport) -> None:
    seconds = [one.seconds for one in report.operators]
    assert len(seconds) == 10 and seconds == sorted(seconds, reverse=True)
    assert sum(one.share for one in report.operators) <= 1
    assert report.operators[0].name in report.verdict and "dominates the plain step" in report.verdict


def test_nothing_is_kept(report: TrainReport, home: Path) -> None:
    assert [path.name for path in home.iterdir()] == ["data"]


def test_the_page_holds_every_figure(report: TrainReport) -> None:
    page = to_markdown(report)
    assert page.startswith("# toy: a training step of objective tokenizer\n")
    assert all(f"| {phase} |" in page for phase in (*PHASES, "whole step", "images/s"))
    assert page.count("| `") == 10 and page.endswith(f"{report.verdict}.")


def test_flops_count_convolutions_forward_and_backward(config: TokenizerRun, report: TrainReport) -> None:
    wider = bench_train(replace(config, data=replace(config.data, batch_size=4)), steps=1)
    assert wider.step_flops == 2 * report.step_flops > 0


def test_attention_on_the_cpu_is_counted() -> None:
    q = torch.zeros(2, 3, 8, 4, requires_grad=True)
    flops = count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    scores = 2 * 2 * 3 * 8 * 8 * 4
    assert flops == 2 * scores + 5 * scores     # the backward pass computes the scores again


def test_the_gemm_rate_is_that_of_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = GemmClock(torch.float32, torch.device("cpu"))
    seconds = iter([1.0, 4.0, 2.0])
    monkeypatch.setattr("arimg.bench.machine.timed", lambda device, function: (next(seconds), None))
    for _ in range(3):
        clock.measure()
    assert clock.rate == GEMM_SIDE ** 3


def test_compiling_without_a_compiler_is_one_line(config: TokenizerRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs the C\\+\\+ compiler no-such-compiler"):
        bench_train(config, compare_compiled=True)


@pytest.mark.slow
def test_plain_and_compiled_take_turns(config: TokenizerRun) -> None:
    report = bench_train(config, steps=1, compare_compiled=True)
    assert [times.network for times in report.networks] == ["plain", "compiled"]
    assert "| compiled, ms |" in to_markdown(report)
    json.dumps(vars(report), default=vars)


def test_a_table() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
