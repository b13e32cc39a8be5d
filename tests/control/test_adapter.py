"""The control component as a whole, and its effect on a model's logits."""

import pytest
import torch

from arimg.control.adapter import ControlAdapter, ControlConfig
from arimg.control.encoder import ControlEncoder
from arimg.control.fusion import combine, injection_layers
from arimg.errors import CheckpointError, InputError
from arimg.models.ar import ARConfig, ARTransformer
from arimg.models.base import Condition

SIZES = dict(embed_dim=16, depth=2, heads=2, ffn_hidden=32, dim=24)
SMALL = ControlConfig(patch=8, stride=8, **SIZES)
VIT = ControlConfig(kind="vit", patch=16, stride=16, image_size=48, **SIZES)
DINOV2 = ControlConfig(kind="dinov2", patch=14, stride=16, image_size=70, types=("canny", "hed"), **SIZES)


def maps(seed=0, size=(48, 48)):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trained(config):
    """An adapter as after training: no parameter is zero."""
    torch.manual_seed(0)
    adapter = ControlAdapter(config).eval()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def pretrained_encoder(config):
    torch.manual_seed(1)
    return {key: torch.randn_like(tensor) for key, tensor in ControlEncoder(config).state_dict().items()}


def is_zero(adapter):
    return all(torch.count_nonzero(layer.fc2.weight) == 0 for layer in adapter.fusion.condition_layers)


@pytest.mark.parametrize("config", [SMALL, VIT, DINOV2], ids=lambda config: config.kind)
def test_inject_shape(config):
    inject_KBLD = trained(config).inject(maps(size=(96, 160)), "bicubic")
    assert inject_KBLD.shape == (3, 2, 96 * 160 // config.stride ** 2, 24)


@pytest.mark.parametrize("config", [VIT, DINOV2], ids=lambda config: config.kind)
def test_defect_11_pretrained_encoder_and_zero_outputs_survive(config):
    state = pretrained_encoder(config)
    adapter = ControlAdapter(config)
    assert is_zero(adapter)
    adapter.load_encoder(state)
    ARTransformer(ARConfig(vocab_size=8, dim=24, layers=3, heads=2, ffn_hidden=32, block_size=9, num_classes=2))
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter.encoder.state_dict().items())
    assert is_zero(adapter)
    assert torch.count_nonzero(adapter.inject(maps())) == 0


def test_defect_12_float32_stays_float32():
    assert trained(VIT).inject(maps()).dtype == torch.float32
    assert trained(VIT).double().inject(maps()).dtype == torch.float64


def test_defect_21_no_run_state_and_no_dead_parameters():
    adapter = trained(SMALL)
    first = adapter.inject(maps())
    adapter.inject(maps(1, (32, 64)))
    assert torch.equal(adapter.inject(maps()), first)
    first.sum().backward()
    assert [name for name, parameter in adapter.named_parameters() if parameter.grad is None] == []


def test_load_encoder_names_every_fault():
    state = pretrained_encoder(VIT)
    state["vit.blocks.0.attn.q_proj.weight"] = state.pop("vit.blocks.0.attn.qkv.weight")
    state["vit.norm.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        ControlAdapter(VIT).load_encoder(state)
    message = str(caught.value)
    assert "\n" not in message
    assert "1 missing: vit.blocks.0.attn.qkv.weight" in message
    assert "1 unexpected: vit.blocks.0.attn.q_proj.weight" in message
    assert "1 of another shape: vit.norm.bias (7,) instead of (16,)" in message


def test_a_failed_load_changes_nothing():
    adapter = ControlAdapter(VIT)
    before = {key: tensor.clone() for key, tensor in adapter.encoder.state_dict().items()}
    with pytest.raises(CheckpointError):
        adapter.load_encoder({"vit.norm.bias": torch.ones(16)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.encoder.state_dict().items())


def test_type_id():
    adapter = ControlAdapter(DINOV2)
    assert [adapter.type_id(name) for name in ("canny", "hed")] == [0, 1]
    with pytest.raises(InputError, match="'depth': this model was trained on canny, hed"):
        adapter.type_id("depth")


@pytest.fixture(scope="module")
def logits():
    """logits_BLV of a toy model on a 6x6 grid, as a function of what is added."""
    torch.manual_seed(2)
    model = ARTransformer(ARConfig(vocab_size=11, dim=24, layers=4, heads=2, ffn_hidden=32, block_size=36,
                                   num_classes=3, inject_layers=injection_layers(4))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    codes_BL = torch.randint(11, (2, 36))
    condition = Condition(class_ids_B=torch.tensor([0, 2]))
    return torch.no_grad()(lambda inject_KBLD: model(codes_BL, condition, (6, 6), inject_KBLD))


def test_strength_zero_equals_no_control_bit_for_bit(logits):
    inject = trained(SMALL).inject(maps())
    assert torch.equal(logits(combine([inject], [0.0])), logits(None))
    assert not torch.equal(logits(combine([inject], [0.1])), logits(None))


def test_untrained_adapter_equals_no_control_bit_for_bit(logits):
    assert torch.equal(logits(ControlAdapter(SMALL).inject(maps())), logits(None))


def test_start_leaves_earlier_logits_and_changes_the_first_of_the_window(logits):
    late = logits(combine([trained(SMALL).inject(maps())], [1.0], [0.5]))
    plain = logits(None)
    assert torch.equal(late[:, :18], plain[:, :18])
    assert (late[:, 18] - plain[:, 18]).abs().amax(-1).min() > 1e-3


def test_end_leaves_logits_inside_the_window_as_they_were(logits):
    inject = trained(SMALL).inject(maps())
    short, full = logits(combine([inject], [1.0], ends=[0.5])), logits(inject)
    assert torch.equal(short[:, :18], full[:, :18])
    assert (short[:, 18] - full[:, 18]).abs().amax(-1).min() > 1e-3


def test_second_control_acts_from_its_own_start(logits):
    adapter = trained(SMALL)
    first, second = adapter.inject(maps()), adapter.inject(maps(1))
    both = logits(combine([first, second], [1.0, 0.7], [0.0, 0.25], [1.0, 1.0]))
    alone = logits(first)
    assert torch.equal(both[:, :9], alone[:, :9])
    assert (both[:, 9] - alone[:, 9]).abs().amax(-1).min() > 1e-3
