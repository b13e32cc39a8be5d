"""The objectives of Distilled Decoding: what their batches hold, what a step trains, what they export and refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from arimg.accel.base import DecodeRequest
from arimg.accel.dd1 import starting_noise
from arimg.accel.find import find_decoder
from arimg.accel.flow import FlowSolver
from arimg.accel.target import Target
from arimg.checkpoints import save_component
from arimg.config import from_dict
from arimg.errors import ArimgError, ConfigError, InputError
from arimg.pipeline import Pipeline
from arimg.registry import OBJECTIVES
from arimg.train import dd2
from arimg.train.dd1 import DD1Objective
from arimg.train.dd2 import DD2Objective, Turns
from arimg.train.dd_losses import pair_loss, score_distillation_loss
from arimg.train.dd_scores import TuningObjective, fit_reader
from arimg.train.loop import Trainer, train
from arimg.train.pairs import PairMaker, PairsConfig, PairSet, make_pairs
from tests.toy import toy_pipeline, toy_text_encoder
from tests.toy_scales import toy_scales_pipeline
from tests.train.toy_emoji import write_toy_emoji

KINDS = ("raster", "scales", "text")
UNITS = {"raster": 16, "scales": 3, "text": 16}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of all kinds and pairs that they made: a raster and scales with control, a raster with captions."""
    root = tmp_path_factory.mktemp("home")
    write_toy_emoji(root / "emoji", size=16)
    (root / "captions.txt").write_text("a cat\n\na red dog on grass\n")
    text = toy_pipeline(conditioning="text", control=None, inject_layers=(), text=toy_text_encoder(12))
    for kind, pipe in zip(KINDS, (toy_pipeline(), toy_scales_pipeline(), text)):
        given = {"captions": str(root / "captions.txt")} if kind == "text" else {"data": str(root / "emoji")}
        make_pairs(PairMaker(pipe, PairsConfig(10, solver=FlowSolver(4), batch=5, shard=4, **given)), root / kind)
        pipe.save_pretrained(root / f"{kind}-teacher")
    return root


@pytest.fixture(autouse=True)
def arimg_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_HOME", str(home))


def run_of(home: Path, objective: str, kind: str, **changes: Any) -> Any:
    values = {"objective": objective, "name": f"{objective}-{kind}", "teacher": str(home / f"{kind}-teacher"),
              "data": {"folder": str(home / kind), "batch_size": 3, "held_out": 4},
              "optim": {"steps": 2, "warmup_steps": 0}, "train": {"log_steps": 1, "ema_decay": 0.5}, **changes}
    return from_dict(OBJECTIVES.load(objective).config_class, values)


def tuned(home: Path, kind: str) -> str:
    """A network of the first stage whose head is not zero any more."""
    folder = home / f"{kind}-tuned"
    if not folder.exists():
        objective = TuningObjective(run_of(home, "dd2-tuning", kind, head_width=16, head_depth=1, fit_steps=2))
        network = objective.network.network
        for parameter in network.head.parameters():
            nn.init.normal_(parameter, std=0.1)
        save_component(network, folder)
    return str(folder)


def painted(pipe: Pipeline, request: DecodeRequest, name: str) -> torch.Tensor:
    """Codes of the decoder of this name, as the pipeline finds it."""
    decoder = find_decoder(name, pipe.transformer, pipe.decoders, lossy=True)
    codes = decoder.decode(Target(pipe.transformer, request), request).codes_BL
    assert codes is not None
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_trained_and_exported_beside_its_teacher(home: Path, kind: str) -> None:
    config = run_of(home, "dd1", kind, timesteps=[0, 2], split=UNITS[kind] - 1)
    objective = DD1Objective(config)
    folder = train(config, objective, "none")
    pipe = Pipeline.from_pretrained(folder, "cpu", "float32")
    student = pipe.decoders["dd1"]
    assert student.config.timesteps == (0, 2) and student.config.split == UNITS[kind] - 1
    original = Pipeline.from_pretrained(home / f"{kind}-teacher", "cpu", "float32")
    for name, tensor in original.transformer.state_dict().items():
        assert torch.equal(tensor, pipe.transformer.state_dict()[name]), name
    assert painted(pipe, objective.held_out_request(torch.device("cpu")), "dd1").shape == objective.codes(
        objective.held_out).shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_step_and_micro_and_holds_what_the_teacher_made(home: Path, kind: str) -> None:
    config = run_of(home, "dd1", kind, timesteps=[0, 1, 2])
    one, other = DD1Objective(config), DD1Objective(replace(config, data=replace(config.data, workers=3)))
    other.batch(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(one.batch(3, 0), other.batch(3, 0), strict=True))
    seen = torch.cat([one.batch(step, 0)[2] for step in range(4)])
    assert sorted(seen.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "two epochs; the last four are held out"
    codes, units, seeds, *conditions = one.batch(0, 0)
    assert set(units.tolist()) <= {0, 1, 2}
    request = one.request(seeds, *conditions)
    noise = PairSet(home / kind).noise(PairSet(home / kind).rows(seeds.numpy()), one.space.codebook_VC)
    assert torch.equal(starting_noise(request), noise)
    assert codes.tolist() == PairSet(home / kind).rows(seeds.numpy())["codes"].tolist()


def test_the_loss_is_of_noise_tokens_alone(home: Path) -> None:
    """A student that is right about noise and wrong about clean tokens has no loss."""
    objective = DD1Objective(run_of(home, "dd1", "raster", timesteps=[0, 5]))
    codes, _, *conditions = objective.batch(0, 0)
    request, clean = objective.request(*conditions), torch.tensor([5, 5, 5])
    space, seen = objective.space, []

    def student(input_BLC: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(input_BLC)
        logits = 50.0 * nn.functional.one_hot(codes, 64).float()
        logits[:, :5] = 0
        return logits, torch.zeros_like(input_BLC)
    loss, figures = objective.loss(student, codes, clean, request)
    assert float(loss) < 1e-6 and float(figures["agreement"]) == 1
    assert torch.equal(seen[0][:, :5], space.codebook_VC[codes[:, :5]])
    assert torch.equal(seen[0][:, 5:], starting_noise(request)[:, 5:])


@pytest.mark.parametrize("kind, split", [("raster", 8), ("scales", 2)])
def test_pictures_teach_latents_from_the_split_on(home: Path, kind: str, split: int) -> None:
    objective = DD1Objective(run_of(home, "dd1", kind, split=split, distance=0.0, perceptual=2.0))
    codes, units, *conditions = objective.batch(0, 0)
    latents = objective.space.codebook_VC[codes].clone()
    latents[:, -1] += 1
    latents.requires_grad_()

    def student(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return 50.0 * nn.functional.one_hot(codes, len(objective.space.codebook_VC)).float(), latents
    loss, figures = objective.loss(student, codes, units, objective.request(*conditions))
    loss.backward()
    distance = float(figures["perceptual"].detach())
    assert distance > 0 and latents.grad is not None
    assert float(loss.detach()) == pytest.approx(2 * distance, abs=1e-5)
    touched = latents.grad.any(-1).any(0).nonzero().flatten().tolist()
    assert touched == list(range(objective.ends[split], codes.shape[1]))


@pytest.mark.parametrize("kind, loss", [("raster", "gts"), ("raster", "fcs"), ("scales", "gts"), ("text", "gts")])
def test_the_first_stage_takes_steps(home: Path, kind: str, loss: str) -> None:
    config = run_of(home, "dd2-tuning", kind, head_width=16, head_depth=1, draws=2, fit_steps=2, loss=loss,
                    init_from=tuned(home, kind))
    trainer = Trainer(config, TuningObjective(config))
    trainer.train_mode()
    before = trainer.first.module.network.backbone.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    assert np.isfinite(float(trainer.train_step()["loss"]))
    assert any(not torch.equal(before[name], tensor)
               for name, tensor in trainer.first.module.network.backbone.state_dict().items())
    assert (trainer.export() / "tuned" / "config.json").exists()


def test_a_head_alone(home: Path) -> None:
    config = run_of(home, "dd2-tuning", "scales", head_width=16, head_depth=1, head_only=True)
    trainer = Trainer(config, TuningObjective(config))
    trainer.train_step()
    teacher = trainer.objective.teacher.transformer.state_dict()      # type: ignore[attr-defined]
    for name, tensor in trainer.first.module.network.backbone.state_dict().items():
        assert torch.equal(tensor, teacher[name]), name


def test_the_token_mlp_learns_the_table(home: Path) -> None:
    objective = TuningObjective(run_of(home, "dd2-tuning", "raster", head_width=16, head_depth=1, fit_steps=0))
    reader, teacher = objective.network.network.backbone.tok_embeddings, objective.teacher.transformer
    codes, codebook = torch.arange(64), objective.space.codebook_VC
    table = codebook @ torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    teacher.load_state_dict({**teacher.state_dict(), "tok_embeddings.weight": table})

    @torch.no_grad()
    def error() -> float:
        return float((reader(codebook) - teacher.embed(codes[None], codes[None])[0]).square().mean())
    before = error()
    fit_reader(reader, codebook, teacher, 200)
    assert error() < before / 2


@pytest.mark.parametrize("kind, changes", [("raster", {}), ("scales", {"loss": "reverse-kl", "weight": "one"}),
                                           ("text", {"alpha": 0.5})])
def test_networks_take_turns(home: Path, kind: str, changes: dict[str, Any]) -> None:
    config = run_of(home, "dd2", kind, init_from=tuned(home, kind), draws=2, turns={"updates": 2},
                    optim={"steps": 4, "warmup_steps": 0, "schedule": "constant"},
                    guidance={"warmup_steps": 0, "schedule": "constant"}, **changes)
    trainer = Trainer(config, DD2Objective(config))
    trainer.train_mode()
    moved = []
    for step in range(4):
        before = {name: [tensor.clone() for tensor in learner.module.parameters()]
                  for name, learner in trainer.learners.items()}
        figures = trainer.train_step()
        assert ("distance" in figures) == ("loss" in figures) == (step % 2 == 1) and "guidance_loss" in figures
        moved.append({name for name, learner in trainer.learners.items()
                      if any(not torch.equal(a, b) for a, b in zip(before[name], learner.module.parameters()))})
    assert moved == [{"guidance"}, {"guidance", "generator"}] * 2
    assert {name: learner.updates for name, learner in trainer.learners.items()} == {"guidance": 4, "generator": 2}
    pipe = Pipeline.from_pretrained(trainer.export(), "cpu", "float32")
    assert len(painted(pipe, trainer.objective.held_out_request(torch.device("cpu")), "dd2")) == 4  # type: ignore


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_token_moves_that_token_alone(home: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d CSD_i / d q_j = 0 for j != i in the objective itself, and nothing of CSD reaches the guidance network."""
    objective, losses = DD2Objective(run_of(home, "dd2", kind, init_from=tuned(home, kind), draws=2)), []

    def recorded(*args: Any) -> torch.Tensor:
        losses.append(score_distillation_loss(*args))
        return losses[0]
    monkeypatch.setattr(dd2, "score_distillation_loss", recorded)
    _, noise, times, other_noise, *conditions = objective.batch(0, 0)
    request = objective.request(*conditions)
    q = objective.tokens(objective.generator, noise, request).detach().requires_grad_()
    loss, _ = objective.distillation(q, times, other_noise, request)
    gradient, = torch.autograd.grad(losses[0][:, 1, 9].sum(), q, retain_graph=True)
    assert gradient.any(-1).nonzero().tolist() == [[1, 9]]
    loss.backward()
    assert q.grad is not None and q.grad.any(-1).all()
    assert all(parameter.grad is None for parameter in objective.guidance.parameters())


def test_turns() -> None:
    turns = Turns(updates=3, align_at=6, align_steps=2, updates_after=2)
    assert [step for step in range(14) if turns.generator_trains(step)] == [2, 5, 9, 11, 13]
    assert [step for step in range(9) if Turns(updates=1).generator_trains(step)] == list(range(9))
    turns = Turns(pairs_alone=2, updates=3, align_at=5, align_steps=1)
    assert [step for step in range(10) if turns.generator_trains(step)] == [0, 1, 4, 7, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_come_before_scores(home: Path, kind: str) -> None:
    config = run_of(home, "dd2", kind, init_from=tuned(home, kind), draws=1, optim={"steps": 3, "warmup_steps": 0},
                    turns={"pairs_alone": 2, "updates": 1}, pair_weight=0.5)
    objective = DD2Objective(config)
    codes, noise, _, _, *conditions = objective.batch(0, 0)
    request = objective.request(*conditions)
    assert torch.equal(noise, starting_noise(request))
    q = objective.tokens(objective.generator, noise, request)
    first = objective.losses({"generator": objective.generator}, objective.batch(0, 0), 0)
    assert torch.equal(first[0]["generator"], pair_loss(q, codes, objective.space.codebook_VC)) and len(first[0]) == 1
    trainer = Trainer(config, objective)
    trainer.train_mode()
    assert ["guidance_loss" in trainer.train_step() for _ in range(3)] == [False, False, True]
    assert {name: learner.updates for name, learner in trainer.learners.items()} == {"generator": 3, "guidance": 1}


def test_the_generator_takes_its_average_for_the_alignment(home: Path) -> None:
    config = run_of(home, "dd2", "raster", init_from=tuned(home, "raster"), draws=1, optim={"steps": 5, "lr": 1e-2},
                    turns={"updates": 1, "align_at": 3, "align_steps": 2})
    trainer = Trainer(config, DD2Objective(config))
    trainer.train_mode()
    learner = trainer.first
    for step in range(5):
        trainer.train_step()
        assert learner.ema is not None
        average = [tensor.clone() for tensor in learner.ema.shadow_params]
        same = all(torch.equal(a, b) for a, b in zip(average, learner.module.parameters()))
        assert same == (step != 1), "the first average is of one, the third step makes it the weights, which then rest"
        assert learner.updates == min(step + 1, 3)


@pytest.mark.parametrize("objective, kind, changes, message", [
    ("dd1", "raster", {"teacher": ""}, "give the teacher's pipeline folder"),
    ("dd1", "raster", {"timesteps": [0, 16]}, "paints 16 units, so the last timestep may be 15"),
    ("dd1", "raster", {"timesteps": [3]}, "grow from 0"),
    ("dd1", "raster", {"distance": -1.0}, "give numbers >= 0"),
    ("dd1", "raster", {"train": {"sharding": "fsdp2"}}, "write sharding=none"),
    ("dd2", "raster", {}, "give the folder tuned"),
    ("dd2", "raster", {"init_from": "x", "loss": "cds"}, "unknown loss 'cds'; did you mean csd"),
    ("dd2", "raster", {"init_from": "x", "turns": {"updates": 0}}, "at least 1 update"),
    ("dd2", "raster", {"init_from": "x", "turns": {"pairs_alone": 3, "align_at": 2}}, "write align_at=3 or more"),
    ("dd2", "raster", {"init_from": "x", "turns": {"pairs_alone": 3}}, "write pair_weight=1"),
    ("dd2", "raster", {"init_from": "x", "pair_weight": -1.0}, "is a number >= 0"),
    ("dd2-tuning", "raster", {"loss": "gt"}, "unknown loss 'gt'; did you mean gts"),
    ("dd2-tuning", "raster", {"t_min": 0.0}, "a time in"),
])
def test_contradictions(home: Path, objective: str, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArimgError, match=message) as caught:
        OBJECTIVES.load(objective)(run_of(home, objective, kind, **changes))
    assert "\n" not in str(caught.value)


def test_another_teacher_and_too_few_pairs(home: Path, tmp_path: Path) -> None:
    other = toy_pipeline(num_classes=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="did not make the pairs"):
        DD1Objective(run_of(home, "dd1", "raster", teacher=str(other)))
    with pytest.raises(ConfigError, match="of 10 pairs, 0 are left"):
        DD1Objective(run_of(home, "dd1", "raster", data={"folder": str(home / "raster"), "held_out": 10}))
    with pytest.raises(InputError, match="holds no pairs"):
        DD1Objective(run_of(home, "dd1", "raster", data={"folder": str(tmp_path)}))
