"""What forms of a model cost in likelihood, and `Pipeline.nll` against teacher forcing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from arimg.cli import main
from arimg.errors import InputError
from arimg.evals.held_out import HeldOut
from arimg.evals.likelihood import evaluate_nll
from arimg.models.base import Condition
from arimg.pipeline import Pipeline
from tests.toy import SIDE, toy_folder, toy_pipeline


def test_nll_is_cross_entropy() -> None:
    pipe = toy_pipeline()
    codes_BL = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BLV = pipe.transformer(codes_BL, Condition(class_ids_B=torch.tensor([0, 2])), (4, 4))
    wanted_BL = F.cross_entropy(logits_BLV.mT, codes_BL, reduction="none")
    torch.testing.assert_close(pipe.nll(codes_BL, class_id=[0, 2], cfg=1.0), wanted_BL, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pipe.nll(codes_BL, class_id=[0, 2], cfg=3.0), wanted_BL, atol=1e-2)
    with pytest.raises(InputError, match="a code for every token"):
        pipe.nll(codes_BL.index_fill(1, torch.tensor([3]), -1), class_id=[0, 2])


def test_the_models_own_guidance_stays_out() -> None:
    pipe = toy_pipeline()
    noise = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    data, plain = HeldOut(noise, ["cat", "dog"], 2, ""), replace(pipe.settings, cfg=1.0)
    values = []
    for settings in (plain, replace(plain, cfg=3.0, control_cfg=4.0, temperature=0.5, top_k=3, top_p=0.5)):
        pipe = Pipeline(pipe.tokenizer, pipe.transformer, pipe.control, settings=settings)
        values.append(evaluate_nll(pipe, {}, data, "canny", 2, 0).value("full", "nats per token"))
    assert values[0] == values[1]


def test_the_command_compares_forms(tmp_path: Path) -> None:
    for name in ("cat", "dog", "fish"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        noise = np.random.default_rng(len(name)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / name / "a.png")
    folder = toy_folder(tmp_path / "toy")
    done = CliRunner().invoke(main, ["eval", "nll", "--model", str(folder), "--quantize", "int8", "--pictures",
                                     str(tmp_path / "pictures"), "-n", "3", "--json", str(tmp_path / "nll.json")])
    assert done.exit_code == 0, (done.stderr, done.exception)
    results = json.loads((tmp_path / "nll.json").read_text(encoding="utf-8"))["results"]
    assert results["full"]["change, %"]["value"] == 0 and 0 < abs(results["int8"]["change, %"]["value"]) < 5
    assert "| int8 |" in done.stdout
