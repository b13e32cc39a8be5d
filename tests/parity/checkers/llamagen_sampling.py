"""LlamaGen's sampler: guidance, temperature, top-k, top-p."""

from __future__ import annotations

import torch

from arimg.accel.base import Guidance, Sampling
from arimg.accel.target import branch_scales, filter_probs, mix
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    """Compare the probabilities of every entry of settings.probs, and the guided logits."""
    logits_B1V = fixture["in.logits"]
    for index, entry in enumerate(fixture.settings["probs"]):
        top_p = entry["top_p"] or torch.finfo().tiny        # 0 keeps the best code alone
        sampling = Sampling(entry["temperature"], entry["top_k"], top_p)
        fixture.compare(f"out.probs_{index}", filter_probs(logits_B1V, sampling)[:, -1])
    if "out.guided" in fixture:
        scales = branch_scales(Guidance(cfg=fixture.settings["cfg_scale"]), controlled=False)
        branches = {"full": logits_B1V, "null": fixture["in.uncond_logits"]}
        fixture.compare("out.guided", mix(torch.stack([branches[name] for name in scales]), scales))
