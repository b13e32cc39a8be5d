"""A complete run of the released speculative runner by the decoder `cspd-relaxed`."""

from __future__ import annotations

import torch

from arimg.accel.relaxed import CspdRelaxed, RelaxedRun
from arimg.accel.target import Target
from arimg.noise import Purpose
from tests.parity.checkers.mar_build import Recorded, build_mar, request_of, unpatched
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    """Compare all outputs."""
    config = fixture.spec["config"]
    runner = config["runner"]
    target, draft = (build_mar(config[name], fixture.state_dict(f"{name}.")) for name in ("target", "draft"))
    orders_BL = fixture["in.orders"]
    noise_BLSC = torch.cat([fixture["in.noise"][:, :, None], fixture["in.inter_noise"]], dim=2)
    noise = Recorded(orders_BL, noise_BLSC, verification_draws(fixture))
    request = request_of(target, fixture["in.labels"], noise, runner["cfg"], runner["temperature"], runner["num_iter"])
    decoder = CspdRelaxed(draft, window=runner["num_draft"], prefill=runner["ratio"],
                          inner_temperature=runner["inner_temperature"], overwrite=True,
                          ramp=runner["cfg_schedule"])
    run, canvases = RelaxedRun(decoder, Target(target, request), request), []
    calls = []
    for step in range(run.plan.steps):
        before = (run.target.passes, run.draft.passes, len(run.verifications))
        canvas_BLC, judge = run.canvas_BLC, run._judge
        shown = []
        run._judge = lambda *parts: (shown.append(canvas_BLC.clone()), judge(*parts))   # type: ignore[assignment]
        run.advance(step)
        run._judge = judge                                                              # type: ignore[method-assign]
        canvases.append(shown[0] if shown else canvas_BLC.clone())
        verified = len(run.verifications) - before[2]
        calls += ["target_step"] * (run.target.passes - before[0] - verified)
        calls += ["draft_step"] * (run.draft.passes - before[1]) + ["target_verify"] * verified
    assert calls == fixture.spec["calls"], calls
    fixture.compare("out.canvas", torch.stack(canvases))
    fixture.compare("out.latents", unpatched(run.canvas_BLC, target))
    check_verifications(fixture, run)


def check_verifications(fixture: Fixture, run: RelaxedRun) -> None:
    """Rows, Gaussians, acceptance values and results of each verification."""
    for k, one in enumerate(run.verifications):
        got = {"index": torch.stack([one.tokens.images_N, one.tokens.positions_N]), "ratio": one.ratio_N,
               "draft_sample": one.draft.latents_NC, "result": one.result_NC}
        for side, sample in (("draft", one.draft), ("target", one.target)):
            got |= {f"{side}_mean": sample.mean_NC, f"{side}_std": sample.std_NC,
                    f"{side}_logstd_sum": sample.earlier_log_std_NC}
        for name, tensor in got.items():
            fixture.compare(f"out.v{k}.{name}", tensor)


def verification_draws(fixture: Fixture) -> dict[tuple[Purpose, int], torch.Tensor]:
    """The recorded random numbers of all verifications by image and position: each token is judged once."""
    shape, channels = fixture["in.orders"].shape, fixture["in.noise"].shape[-1]
    draws: dict[tuple[Purpose, int], torch.Tensor] = {}
    for k, about in enumerate(fixture.spec["verifications"]):
        images_N, positions_N = fixture[f"out.v{k}.index"]
        recorded = {(Purpose.ACCEPT, 0): f"in.v{k}.uniform"}
        for turn in range(about["rounds"]):
            recorded |= {(Purpose.RESIDUAL, 2 * turn): f"in.v{k}.proposal_normal.{turn:03d}",
                         (Purpose.RESIDUAL, 2 * turn + 1): f"in.v{k}.proposal_uniform.{turn:03d}"}
        for key, name in recorded.items():
            values = fixture[name]
            blank = torch.full((*shape, channels) if values.ndim > 1 else shape, torch.nan)
            draws.setdefault(key, blank)[images_N, positions_N] = values
    return draws
