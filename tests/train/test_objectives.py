"""The objectives `ar` and `control`: what a batch holds, what is learnt from it, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arimg.checkpoints import load_component, save_component
from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.data import to_images
from arimg.errors import CheckpointError, ConfigError, UnknownNameError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.pipeline import Pipeline
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from arimg.train.ar import ARObjective, ARRun
from arimg.train.control import ControlObjective, ControlRun
from arimg.train.data_config import BucketConfig, CropConfig, DataConfig
from arimg.train.growth import deepened
from arimg.train.loop import Batches, train
from arimg.train.run import LoopConfig, OptimConfig
from tests.train.toy_emoji import write_toy_emoji
from tests.train.toy_sources import write_folder

TYPES = ("canny", "softedge", "lineart", "color")
COUNT = 12          # pictures of the toy set
MODEL = ARConfig(vocab_size=16, dim=16, layers=2, heads=2, ffn_hidden=32, block_size=64, num_classes=2,
                 rope_prefix="identity", rope_grid="true", inject_layers=(0, 1), codebook_dim=4, token_dropout=0.0,
                 residual_dropout=0.0, ffn_dropout=0.0)
ADAPTER = ControlConfig(embed_dim=8, depth=1, heads=2, ffn_hidden=16, patch=2, stride=2, dim=16, points=2, types=TYPES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("home")
    write_toy_emoji(root / "data" / "emoji-128")
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1),
                                     res_blocks=1, z_channels=8))
    save_component(tokenizer, root / "tokenizer")
    return root


@pytest.fixture(autouse=True)
def arimg_home(home, monkeypatch):
    monkeypatch.setenv("ARIMG_HOME", str(home))


def common(home, name):
    return {"name": name, "tokenizer": str(home / "tokenizer"), "data": DataConfig(batch_size=8), "model": MODEL,
            "optim": OptimConfig(steps=2, warmup_steps=1), "train": LoopConfig(log_steps=1)}


@pytest.fixture
def ar_run(home, request):
    return ARRun(objective="ar", **common(home, request.node.name))


@pytest.fixture
def control_run(home, request):
    return ControlRun(objective="control", control=ADAPTER, **common(home, request.node.name))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_is_a_function_of_seed_step_and_micro(control_run):
    objective, other = ControlObjective(control_run), ControlObjective(control_run)
    again = other.batch(3, 0)
    assert all(torch.equal(a, b) for a, b in zip(objective.batch(3, 0), again))
    for step, micro in ((4, 0), (3, 1)):
        assert not torch.equal(objective.batch(step, micro)[4], again[4])


def test_samples_carry_the_map_of_their_type_and_of_their_mirror_image(control_run):
    """Colour maps of the toy pictures tell which half a square is in; codes, map and picture must agree."""
    objective = ControlObjective(replace(control_run, control=replace(ADAPTER, types=("color",))))
    feed, tokenizer = objective.feed, objective.cache.tokenizer
    for index in (0, 4):
        straight, mirrored = (feed.example(index, np.random.default_rng(0), (16, 16), variant) for variant in (0, 1))
        assert np.array_equal(straight.pixels_HW3, objective.source.emoji.images[index])
        assert np.array_equal(mirrored.pixels_HW3, straight.pixels_HW3[:, ::-1])
        for example in (straight, mirrored):
            coloured, expected = ((pixels < 240).any(axis=2) for pixels in (example.map_HW3, example.pixels_HW3))
            assert (coloured == expected).mean() > 0.9
            codes = tokenizer.encode(to_images(np.stack([example.pixels_HW3]))).codes_BL
            assert torch.equal(objective.cache.of([example]), codes)


def test_every_type_is_drawn_as_often_as_its_weight_says(control_run):
    config = replace(control_run, type_weights={"canny": 3.0, "color": 2.0})
    assert config.type_shares().tolist() == [3 / 7, 1 / 7, 1 / 7, 2 / 7]
    objective = ControlObjective(config)
    drawn = torch.cat([objective.batch(step, 0)[5] for step in range(25)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, torch.tensor(config.type_shares()).float(), atol=0.12)


def test_held_out_maps_are_the_same_every_time_and_all_kept(control_run):
    first, again = (ControlObjective(control_run).held_out_batch for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first[4].shape == (3, 3, 16, 16) and first[6].all() and not first[3].any()


@pytest.mark.parametrize("flip, expected", [(True, {0, 1}), (False, {0})])
def test_half_of_the_samples_are_flipped_if_asked_for(ar_run, flip, expected):
    objective = ARObjective(replace(ar_run, flip=flip))
    examples = [example for step in range(4) for example in objective.feed.batch(step, 0, (16, 16))]
    assert {example.variant for example in examples} == expected
    assert not objective.source.emoji.held_out[[example.index for example in examples]].any()
    codes, _, class_ids, drop = objective.batch(3, 0)
    assert class_ids.tolist() == [int(objective.source.labels()[example.index]) for example in examples[-8:]]
    assert codes.shape == (8, 64) and drop.dtype == torch.bool


@pytest.mark.parametrize("share, least, most", [(0.0, 0, 0), (0.5, 0.2, 0.8), (1.0, 1, 1)])
def test_a_share_of_dropped_classes_takes_the_control_along(control_run, share, least, most):
    config = replace(control_run, model=replace(MODEL, class_dropout=0.5), control_dropout=0.0, drop_together=share)
    objective = ControlObjective(config)
    batches = [objective.batch(step, 0) for step in range(8)]
    dropped, keep = (torch.cat([batch[at] for batch in batches]) for at in (-4, -1))
    assert keep[~dropped].all()
    assert least <= (~keep[dropped]).float().mean() <= most


# ---------------------------------------------------------------------------------------------------------------------
# Other sources


def folder_run(control_run, folder, **data):
    settings = {"source": "folder", "folder": str(folder), "batch_size": 4, "crop": CropConfig("random", 16)}
    return replace(control_run, data=DataConfig(**settings | data), model=replace(MODEL, num_classes=3),
                   control=replace(ADAPTER, types=("canny",)), maps="extracted")


def test_control_trains_from_a_folder_of_pictures(control_run, tmp_path):
    folder = train(*(lambda config: (config, ControlObjective(config)))(
        folder_run(control_run, write_folder(tmp_path / "data"))))
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.settings.class_names == ("cat", "dog", "emu") and pipeline.settings.size == (16, 16)


def test_sizes_are_drawn_for_each_micro_batch_and_the_model_sees_them(control_run, tmp_path):
    """ControlAR's multi-resolution training (section 3.4), which its published code cannot run."""
    buckets = BucketConfig(min_side=8, max_side=24, step=4, max_tokens=64)
    config = replace(folder_run(control_run, write_folder(tmp_path / "data"), buckets=buckets),
                     train=LoopConfig(accumulation=2))
    objective, seen = ControlObjective(config), set()
    for step in range(12):
        batch = objective.batch(step, step % 2)
        codes, maps = batch[0], batch[4]
        height, width = maps.shape[2:]
        seen.add((height, width))
        assert codes.shape == (4, height // 2 * (width // 2)) and codes.shape[1] <= 64
        assert objective.network.grid_of(maps) == (height // 2, width // 2)
        assert all(torch.equal(a, b) for a, b in zip(batch, objective.batch(step, step % 2)))
    assert len(seen) > 4 and {height == width for height, width in seen} == {True, False}
    loss, _ = objective.network(*batch)
    loss.backward()
    assert torch.isfinite(loss)


def test_buckets_need_maps_and_crops_of_any_shape(control_run, ar_run, tmp_path):
    config = folder_run(control_run, write_folder(tmp_path / "data"), buckets=BucketConfig(8, 16, 4, 64))
    with pytest.raises(ConfigError, match="data.buckets: a model learns the size .* use objective: control"):
        ARObjective(replace(ar_run, data=config.data, model=config.model))
    with pytest.raises(ConfigError, match="data.crop.kind=ten: makes squares; with data.buckets write random"):
        ControlObjective(replace(config, data=replace(config.data, crop=CropConfig("ten", 16))))


def test_an_encoder_starts_from_pretrained_weights(control_run, tmp_path):
    from safetensors.torch import save_file

    vit = replace(ADAPTER, kind="vit", image_size=16, types=("canny",))
    config = replace(control_run, control=vit, encoder_weights=str(tmp_path / "vit.safetensors"))
    state = {key: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
             for key, tensor in ControlAdapter(vit).encoder.state_dict().items()}
    save_file(state, tmp_path / "vit.safetensors")
    loaded = ControlObjective(config).network.control.encoder.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


# ---------------------------------------------------------------------------------------------------------------------
# Batches ahead


def test_batches_are_made_ahead_and_are_the_same():
    made = []
    batches = Batches(lambda step: made.append(step) or (torch.tensor(step),))
    assert [int(batches.get(step)[0]) for step in (0, 1, 2, 7, 8)] == [0, 1, 2, 7, 8]
    batches.pool.shutdown()
    assert made == [0, 1, 2, 3, 7, 8, 9], "each once, even those never used"


def test_what_a_batch_raises_reaches_the_loop():
    batches = Batches(lambda step: (torch.zeros(1),) if step < 1 else 1 / 0)
    batches.get(0)
    with pytest.raises(ZeroDivisionError):
        batches.get(1)


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def test_the_type_and_the_map_reach_the_loss(control_run):
    objective = ControlObjective(control_run)
    network = objective.network.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    codes, read, classes, drop, maps, types, keep = objective.batch(0, 0)
    keep = torch.ones_like(keep)
    with torch.no_grad():
        loss = float(network(codes, read, classes, drop, maps, types, keep)[0])
        assert float(network(codes, read, classes, drop, maps, (types + 1) % 4, keep)[0]) != loss
        assert float(network(codes, read, classes, drop, -maps, types, keep)[0]) != loss
        dropped = [float(network(codes, read, classes, drop, m, types, ~keep)[0]) for m in (maps, -maps)]
    assert dropped[0] == dropped[1] != loss, "a dropped control adds nothing"


@pytest.mark.parametrize("objective, config", [(ARObjective, "ar_run"), (ControlObjective, "control_run")])
def test_the_loss_falls(objective, config, request):
    config = replace(request.getfixturevalue(config), optim=OptimConfig(steps=30, lr=1e-2, warmup_steps=1))
    held = objective(config)
    before = held.validation_loss(held.network)
    train(config, held)
    assert held.validation_loss(held.network) < before - 0.2


def test_the_ar_export_is_a_pipeline_without_control(ar_run):
    folder = train(ar_run, ARObjective(ar_run))
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline(class_name="toy/odd", seeds=[1]).images[0].size == (16, 16)
    assert not (folder / "control").exists() and pipeline.settings.control_types == ()


def test_the_control_export_takes_every_type(control_run):
    folder = train(control_run, ControlObjective(control_run))
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.settings.control_types == TYPES
    picture = torch.from_numpy(ControlObjective(control_run).source.emoji.images[0].copy())
    for name in TYPES:
        assert pipeline(control=picture.numpy(), control_type=name, seeds=[1]).images[0].size == (16, 16)


def test_a_control_run_starts_from_an_ar_run(ar_run, control_run):
    folder = train(ar_run, ARObjective(ar_run))
    network = ControlObjective(replace(control_run, init_from=str(folder))).network
    trained = load_component(folder / "transformer").state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in network.transformer.state_dict().items())


def test_weights_of_16_bits_are_trained_in_float32(control_run, tmp_path):
    folder = train(control_run, ControlObjective(control_run))
    for name in ("transformer", "control"):
        save_component(load_component(folder / name), tmp_path / name, torch.bfloat16)
    network = ControlObjective(replace(control_run, init_from=str(tmp_path))).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_deeper_network_starts_where_the_shallower_one_ended(control_run):
    """New layers are the identity, whatever the others have learnt; and they learn."""
    folder = train(control_run, ControlObjective(control_run))
    deep = replace(control_run, init_from=str(folder), new_layers=(0, 2), new_control_layers=(1,),
                   model=replace(MODEL, layers=4, inject_layers=(1, 3)), control=replace(ADAPTER, depth=2))
    shallow, deeper = (ControlObjective(config) for config in (replace(control_run, init_from=str(folder)), deep))
    losses = [objective.validation_loss(objective.network) for objective in (shallow, deeper)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(deeper.network.transformer.layers) == 4
    assert not deeper.network.transformer.layers[2].attention.wo.weight.any()
    train(replace(deep, name=f"{deep.name}-deep"), deeper)
    assert deeper.network.transformer.layers[2].attention.wo.weight.any()
    assert deeper.network.control.encoder.vit.blocks[1].mlp.fc2.weight.any()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("numbers", [(4,), (-1,), (1, 1)])
def test_new_layers_that_are_none(numbers):
    network = ARTransformer(replace(MODEL, layers=4))
    with pytest.raises(ConfigError, match="must be different numbers from 0 to 3"):
        deepened(network, {}, numbers)


def test_what_cannot_grow(control_run):
    with pytest.raises(ConfigError, match="new_layers, new_control_layers: grow a trained network.*init_from"):
        replace(control_run, new_layers=(1,))
    with pytest.raises(ConfigError, match="new layers for Linear: only the AR transformer and the small"):
        deepened(torch.nn.Linear(2, 2), {}, (0,))


@pytest.mark.parametrize("types, message", [
    (("canny", "softege"), "unknown control type 'softege'; did you mean softedge"),
    (("hed",), "unknown control type with training maps 'hed'; known: canny, color, lineart, softedge"),
])
def test_types_that_cannot_be_trained(control_run, types, message):
    with pytest.raises(UnknownNameError) as caught:
        replace(control_run, control=replace(ADAPTER, types=types))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("weights, error, message", [
    ({"cany": 1.0}, UnknownNameError, "type in type_weights 'cany'; did you mean canny"),
    ({"canny": 0.0}, ConfigError, "type_weights.canny=0.0: must be positive.*control.types"),
    ({"canny": float("nan")}, ConfigError, "type_weights.canny=nan"),
    ({"canny": float("inf")}, ConfigError, "type_weights.canny=inf"),
])
def test_weights_that_mean_nothing(control_run, weights, error, message):
    with pytest.raises(error, match=message):
        replace(control_run, type_weights=weights)


def test_parts_that_do_not_fit(ar_run, control_run, tmp_path):
    with pytest.raises(ConfigError, match="control.dim=8: feeds a model of dim 16"):
        replace(control_run, control=replace(ADAPTER, dim=8))
    with pytest.raises(ConfigError, match="control.points=3: model.inject_layers has 2"):
        replace(control_run, control=replace(ADAPTER, points=3))
    with pytest.raises(ConfigError, match="vocab_size=32: the tokenizer .* has 16 codes; write vocab_size: 16"):
        ARObjective(replace(ar_run, model=replace(MODEL, vocab_size=32)))
    with pytest.raises(ConfigError, match="num_classes=3: the data set .* has 2; write num_classes: 2"):
        ARObjective(replace(ar_run, model=replace(MODEL, num_classes=3)))
    with pytest.raises(ConfigError, match="text_encoder: is empty"):
        ARObjective(replace(ar_run, model=replace(MODEL, conditioning="text")))
    with pytest.raises(ConfigError, match="control.stride=4: the tokenizer .* has 2 pixels per token"):
        ControlObjective(replace(control_run, control=replace(ADAPTER, stride=4, patch=4)))
    with pytest.raises(ConfigError, match="data.crop: kind=ten.*leave data.crop out"):
        ARObjective(replace(ar_run, data=DataConfig(crop=CropConfig("ten", 16))))
    with pytest.raises(ConfigError, match="this encoder scales maps"):
        replace(control_run, control=replace(ADAPTER, patch=4))
    with pytest.raises(UnknownNameError, match="unknown maps 'extract'; did you mean extracted"):
        replace(control_run, maps="extract")
    with pytest.raises(CheckpointError, match="transformer"):
        ControlObjective(replace(control_run, init_from=str(tmp_path)))
