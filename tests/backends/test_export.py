"""Exported models: the same laws, the same codes and the same pixels as torch, whatever a decoder asks for."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arimg.backends.ops import RUNTIMES, int4_rows, int8_rows, packed
from arimg.backends.transformer import ExportedTransformer, OnnxTransformer
from arimg.checkpoints import INDEX, load_component
from arimg.errors import CheckpointError, InputError, UnknownNameError
from arimg.export import export_component, export_pipeline
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition
from arimg.pipeline import Pipeline
from arimg.quantize import Int8Linear
from arimg.threads import cpu_threads
from tests.toy import SIDE, toy_folder, toy_pipeline

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
INSTALLED = [pytest.param(name, marks=pytest.mark.skipif(
    find_spec(PACKAGES[name]) is None, reason=f"{PACKAGES[name]} is not installed: pip install 'arimg[export]'"))
    for name in RUNTIMES]
runtimes = pytest.mark.parametrize("runtime", INSTALLED)
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None,
                                reason="onnxruntime is not installed: pip install 'arimg[export]'")


Twins = tuple[Pipeline, Pipeline]


def exported(folder: Path, runtime: str, weights: str = "float32", **options: Any) -> Twins:
    """A toy pipeline of torch and its exported twin."""
    source = toy_folder(folder / "toy", **options)
    export_pipeline(source, runtime, weights, folder / runtime)
    return (Pipeline.from_pretrained(source, dtype="float32"),
            Pipeline.from_pretrained(folder / runtime, dtype="float32"))


@pytest.fixture(scope="module", params=INSTALLED)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """The usual toy on each runtime, made once: pipelines hold no state."""
    return exported(tmp_path_factory.mktemp("twins"), request.param)


def control_map() -> Tensor:
    map_3HW = torch.full((3, SIDE, SIDE), -1.0)
    map_3HW[:, 4:12, 6] = 1
    return map_3HW


@pytest.mark.parametrize("decoder", ["ar", "jacobi", "scd-siblings", "sjd"])
def test_every_decoder_draws_the_codes_that_torch_draws(twins: Twins, decoder: str) -> None:
    ours, theirs = twins
    call = {"control": control_map(), "class_name": ["cat", "dog"], "decoder": decoder, "cfg": 2.0, "seeds": [3, 4],
            "output_type": "pt", **({"window": 4} if decoder != "ar" else {})}
    wanted, got = ours(**call), theirs(**call)
    assert torch.equal(got.codes, wanted.codes)
    torch.testing.assert_close(got.images, wanted.images, atol=1e-4, rtol=0)
    assert got.stats.extra["guarantee"] == wanted.stats.extra["guarantee"]


@pytest.mark.parametrize("options", [
    {"control_cfg": 3.0, "cfg": 1.5}, {"control_cfg": 3.0, "cfg": 2.0, "guidance_order": "control-first"},
    {"cfg": 3.0, "cfg_interval": (2, 9)}, {"cfg": 1.0, "top_k": 5}, {"cfg": 3.0, "plausibility": 0.2}])
def test_guidance_branches_lie_in_rows(twins: Twins, options: dict[str, Any]) -> None:
    """Three branches, passes with fewer rows than the cache, and one row."""
    ours, theirs = twins
    call = {"control": control_map(), "class_name": "dog", "decoder": "jacobi", "window": 4, **options}
    assert torch.equal(theirs(**call).codes, ours(**call).codes)


@runtimes
def test_captions_hide_their_padding(tmp_path: Path, runtime: str) -> None:
    ours, theirs = exported(tmp_path, runtime, conditioning="text")
    embeds_PC = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": embeds_PC, "prompt_attention_mask": torch.tensor([0, 0, 0, 1, 1, 1]), "cfg": 2.0}
    assert torch.equal(theirs(**call).codes, ours(**call).codes)


@runtimes
@pytest.mark.parametrize("shape", [{"kv_heads": 2}, {"codebook_dim": 4}, {"rope_prefix": "zero", "rope_grid": "table"}])
def test_other_shapes_of_the_network(tmp_path: Path, runtime: str, shape: dict[str, Any]) -> None:
    ours, theirs = exported(tmp_path, runtime, **shape)
    codes_BL = torch.arange(32).view(2, 16) % ours.transformer.vocab_size
    call = {"class_name": ["cat", "dog"], "cfg": 1.0}
    torch.testing.assert_close(theirs.nll(codes_BL, **call), ours.nll(codes_BL, **call), atol=1e-4, rtol=1e-4)


@runtimes
def test_another_size_and_a_longer_sequence(tmp_path: Path, runtime: str) -> None:
    """More slots than one step of the cache, and a picture that is not square."""
    ours, theirs = exported(tmp_path, runtime, block_size=256)
    call = {"size": (32, 48), "class_name": "cat", "decoder": "jacobi", "output_type": "pt"}
    wanted, got = ours(**call), theirs(**call)
    assert torch.equal(got.codes, wanted.codes) and got.codes.shape == (1, 96)
    torch.testing.assert_close(got.images, wanted.images, atol=1e-4, rtol=0)


def test_a_mask_replaces_the_causal_rule_inside_a_pass(twins: Twins) -> None:
    ours, theirs = twins
    condition = Condition(class_ids_B=torch.tensor([1]))
    slots_RW = torch.arange(1, 5)[None]
    mask_RWW = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()[None]
    results = []
    for network in (ours.transformer, theirs.transformer):
        cache = network.new_cache(1, 17, (4, 4))
        network.step(network.prefix(condition), torch.zeros(1, 1, dtype=torch.int64), cache)
        for codes in ([5, 6, 7, 8], [9, 10, 11, 12]):           # the second pass replaces the first one
            x_RWD = network.embed(torch.tensor([codes]), slots_RW)
            logits = network.logits(network.step(x_RWD, slots_RW, cache, mask_RWW=mask_RWW))
        results.append(logits)
    torch.testing.assert_close(results[1], results[0].detach(), atol=1e-3, rtol=1e-3)


@runtimes
def test_int8_weights_round_as_in_torch(tmp_path: Path, runtime: str) -> None:
    ours, theirs = exported(tmp_path, runtime, "int8")
    call = {"class_name": ["cat", "dog"], "cfg": 1.0}
    codes_BL = torch.arange(32).view(2, 16)
    full, rounded = ours.nll(codes_BL, **call), theirs.nll(codes_BL, **call)
    change = float((rounded.mean() / full.mean() - 1).abs())
    assert 0 < change < 0.02 and float((rounded - full).abs().max()) > 1e-4


@runtimes
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_activations_change_no_code_of_a_wide_pass(tmp_path: Path, runtime: str, weights: str) -> None:
    """Also with the one row of a picture without guidance, and where the cache grows on the way."""
    _, theirs = exported(tmp_path, runtime, weights, dim=64, heads=4, block_size=256, control=None, inject_layers=())
    for cfg, n in ((1.0, 1), (2.0, 1), (2.0, 3)):
        call = {"class_name": "cat", "size": (32, 48), "cfg": cfg, "n": n}
        wanted = theirs(**call)
        for decoder in ({"decoder": "jacobi", "window": 5}, {"decoder": "jacobi"}):
            got = theirs(**call, **decoder)
            assert torch.equal(got.codes, wanted.codes) and got.stats.extra["guarantee"] == "same-codes"


@needs_onnx
@pytest.mark.parametrize("rows,width", [(1, 5), (3, 2), (3, 3), (1, 129), (3, 43)])
def test_wide_passes_in_four_bits_have_the_very_laws_of_single_ones(tmp_path: Path, rows: int, width: int) -> None:
    """With injected rows, on two threads; all but (3, 2) leave one row over, two of them behind a tile of 128."""
    torch.manual_seed(0)
    network = ARTransformer(ARConfig(vocab_size=32, dim=128, layers=2, heads=4, ffn_hidden=256, block_size=256,
                                     num_classes=2, inject_layers=(0,)))
    torch.nn.init.normal_(network.output.weight)
    with cpu_threads(2):
        export_component(network, "onnx", "int4", tmp_path)
        exported = load_component(tmp_path, torch.float32)
    assert exported.exact
    slots_RW, x_RWD = torch.arange(1, 1 + width).expand(rows, -1), torch.randn(rows, width, 128)
    inject_KRWD, cache = torch.randn(1, rows, width, 128), exported.new_cache(rows, 257, (16, 16))
    alone = [exported.step(x_RWD[:, k:k + 1], slots_RW[:, k:k + 1], cache, inject_KRWD[:, :, k:k + 1])
             for k in range(width)]
    together = exported.step(x_RWD, slots_RW, exported.new_cache(rows, 257, (16, 16)), inject_KRWD)
    assert torch.equal(together, torch.cat(alone, dim=1))


@needs_onnx
def test_a_single_leaf_is_read_as_among_others(tmp_path: Path) -> None:
    """A scratch slot at the place of another one."""
    torch.manual_seed(0)
    network = ARTransformer(ARConfig(vocab_size=32, dim=128, layers=2, heads=4, ffn_hidden=256, block_size=16))
    torch.nn.init.normal_(network.output.weight)
    export_component(network, "onnx", "int4", tmp_path)
    exported, x_1WD = load_component(tmp_path, torch.float32), torch.randn(1, 4, 128)
    slots_1W, at_1W = torch.tensor([[1, 2, 17, 18]]), torch.tensor([[1, 2, 3, 3]])
    together = exported.step(x_1WD, slots_1W, exported.new_cache(1, 17, (4, 4), scratch=2), at_RW=at_1W)
    cache = exported.new_cache(1, 17, (4, 4), scratch=2)
    alone = [exported.step(x_1WD[:, k:k + 1], slots_1W[:, k:k + 1], cache, at_RW=at_1W[:, k:k + 1]) for k in range(4)]
    assert torch.equal(together, torch.cat(alone, dim=1))


@needs_onnx
def test_a_graph_of_another_form_is_named(tmp_path: Path) -> None:
    """As exported before keys and values were written in place."""
    import onnx

    network = ARTransformer(ARConfig(vocab_size=32, dim=64, layers=1, heads=4, ffn_hidden=128, block_size=16))
    export_component(network, "onnx", "float32", tmp_path)
    model = onnx.load(tmp_path / "step.onnx")
    del model.graph.output[:2]
    onnx.save(model, tmp_path / "step.onnx")
    with pytest.raises(CheckpointError, match="older arimg; export the model again"):
        load_component(tmp_path, torch.float32)


@needs_onnx
def test_a_promise_of_same_codes_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a wide pass has other sums, as on a processor with other kernels."""
    _, theirs = exported(tmp_path, "onnx", "int8")
    step = OnnxTransformer.step

    def other(self: OnnxTransformer, x_RWD: Tensor, slots_RW: Tensor, *rest: Any, **more: Any) -> Tensor:
        return step(self, x_RWD, slots_RW, *rest, **more) * (1 + 2.0 ** -20 * (slots_RW.shape[1] > 1))

    monkeypatch.setattr(OnnxTransformer, "step", other)
    assert theirs(class_name="cat", decoder="jacobi").stats.extra["guarantee"] == "tolerance"


def test_rows_of_int8() -> None:
    weight_NK = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    codes_NGg, scales_NG = int8_rows(weight_NK.numpy())
    linear = torch.nn.Linear(100, 16, bias=False)
    linear.weight.data = weight_NK
    theirs = Int8Linear(linear)
    back_NK = torch.from_numpy(codes_NGg[:, 0] * scales_NG)
    assert float((back_NK - weight_NK).abs().max()) <= float(scales_NG.max()) / 2 * 1.001
    torch.testing.assert_close(theirs(torch.eye(100)).T, back_NK, atol=0.05, rtol=0)
    blocks, scales = int8_rows(weight_NK.numpy(), 32)
    assert blocks.shape == (16, 4, 32) and scales.shape == (16, 4) and not blocks[:, 3, 4:].any()


@runtimes
def test_int4_weights_and_a_tokenizer_that_stays(tmp_path: Path, runtime: str) -> None:
    source = toy_folder(tmp_path / "toy", dim=64, heads=4, control=None, inject_layers=())
    folder = export_pipeline(source, runtime, "int4", tmp_path / runtime, keep_tokenizer=True)
    full, small = (Pipeline.from_pretrained(one, dtype="float32") for one in (source, folder))
    assert type(small.tokenizer) is type(full.tokenizer)
    codes_BL = torch.arange(32).view(2, 16)
    change = small.nll(codes_BL, class_name=["cat", "dog"], cfg=1.0).mean() / full.nll(
        codes_BL, class_name=["cat", "dog"], cfg=1.0).mean() - 1
    assert 1e-4 < float(change.abs()) < 0.1


def test_rows_of_int4() -> None:
    weight_NK = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).numpy()
    codes_NGg, zeros_NG, scales_NG = int4_rows(weight_NK)
    back_NGg = (codes_NGg.astype("float32") - zeros_NG[..., None]) * scales_NG[..., None]
    assert abs(back_NGg - weight_NK.reshape(back_NGg.shape)).max() <= scales_NG.max() * 1.01
    both = packed(codes_NGg)
    assert both.shape == (8, 2, 32) and (both & 15 == codes_NGg[..., 0::2]).all()
    assert (both >> 4 == codes_NGg[..., 1::2]).all() and packed(zeros_NG[:, :1]).shape == (8, 1)


@runtimes
def test_what_cannot_be_done_is_said_in_one_line(tmp_path: Path, runtime: str) -> None:
    _, theirs = exported(tmp_path, runtime)
    with pytest.raises(InputError, match="encode with the model that it was exported from"):
        theirs.tokenizer.encode(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(CheckpointError, match="copy its folder"):
        theirs.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="float32 on the CPU"):
        theirs.to(torch.float64)
    with pytest.raises(InputError, match="leave it out"):
        Pipeline.from_pretrained(tmp_path / runtime, quantize="int8")
    with pytest.raises(InputError, match="ARTransformer and VQTokenizer"):
        export_pipeline(tmp_path / runtime, runtime, "float32", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    graph, = (tmp_path / runtime / "transformer").glob("step.[ox]*l" if runtime == "openvino" else "step.onnx")
    graph.write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="export the model again"):
        Pipeline.from_pretrained(tmp_path / runtime)
    graph.unlink()
    with pytest.raises(CheckpointError, match="not complete"):
        Pipeline.from_pretrained(tmp_path / runtime)


def test_names_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="openvino"):
        export_pipeline("emoji", "openvin", "float32", tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arimg.backends.ops.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'arimg\[export\]'"):
        export_pipeline("emoji", "onnx", "float32", tmp_path / "out")


def test_the_class_tells_its_runtime() -> None:
    network = ExportedTransformer(ARConfig(vocab_size=8, dim=16, layers=1, heads=2, ffn_hidden=16, block_size=4))
    assert network.exact and network.vocab_size == 8
    assert isinstance(toy_pipeline().transformer, ARTransformer)
    assert replace(network.config, conditioning="text").prefix_length == network.config.caption_length
