"""Fusion MLPs, injection points and the combination of several controls."""

import math

import pytest
import torch
import torch.nn.functional as F

from arimg.control.fusion import MLP, ControlFusion, at_scales, combine, injection_layers
from arimg.errors import ConfigError, InputError


def inject(seed=0, length=10):
    return torch.randn(3, 2, length, 4, generator=torch.Generator().manual_seed(seed))


def test_mlp_by_formula():
    mlp, x = MLP(3, 5), torch.randn(2, 3)
    h = x @ mlp.fc1.weight.T
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    torch.testing.assert_close(mlp(x), gelu @ mlp.fc2.weight.T)


def test_injections_are_three_mlps_of_one_control():
    fusion = ControlFusion(6, 8, 3)
    for layer in fusion.condition_layers:
        torch.nn.init.normal_(layer.fc2.weight)
    tokens = torch.randn(2, 5, 6)
    control = fusion.condition_mlp(fusion.adapter_mlp(tokens))
    result = fusion(tokens)
    assert result.shape == (3, 2, 5, 8)
    for k in range(3):
        hidden = F.gelu(control @ fusion.condition_layers[k].fc1.weight.T, approximate="tanh")
        torch.testing.assert_close(result[k], hidden @ fusion.condition_layers[k].fc2.weight.T)


def test_new_fusion_adds_exactly_nothing_but_learns():
    fusion = ControlFusion(6, 8, 3)
    result = fusion(torch.randn(2, 5, 6))
    assert torch.count_nonzero(result) == 0
    (result - 1).square().sum().backward()
    assert all(layer.fc2.weight.grad.abs().max() > 1e-3 for layer in fusion.condition_layers)


def test_hidden_signal_keeps_its_size_through_a_new_fusion():
    fusion = ControlFusion(64, 256, 3)
    control = fusion.condition_mlp(fusion.adapter_mlp(torch.randn(2, 50, 64)))
    assert 0.1 < control.std() < 1


def test_zero_control_adds_exactly_zero_after_training():
    fusion = ControlFusion(6, 8, 3)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    assert torch.count_nonzero(fusion(torch.zeros(1, 4, 6))) == 0


@pytest.mark.parametrize("layers, expected", [(12, (0, 4, 8)), (24, (0, 8, 16)), (36, (0, 12, 24)), (3, (0, 1, 2)),
                                              (1, (0,)), (2, (0, 1))])
def test_injection_layers(layers, expected):
    assert injection_layers(layers) == expected


@pytest.mark.parametrize("layers, expected", [(22, (0, 7, 14)), (32, (0, 10, 20)), (4, (0, 1, 2)), (5, (0, 1, 2))])
def test_defect_13_layer_counts_not_divisible_by_three(layers, expected):
    assert injection_layers(layers) == expected


@pytest.mark.parametrize("points", range(1, 6))
def test_injection_layers_are_distinct_layers_of_the_model(points):
    for layers in range(1, 50):
        places = injection_layers(layers, points)
        assert len(set(places)) == len(places) == min(points, layers)
        assert places[0] == 0 and max(places) < layers


def test_injection_layers_of_nothing():
    with pytest.raises(ConfigError, match="3 injection points in 0 layers"):
        injection_layers(0)


def test_one_control_at_strength_one_is_itself():
    assert torch.equal(combine([inject()], [1.0]), inject())


def test_defect_13_strength_multiplies_after_the_mlp():
    torch.testing.assert_close(combine([inject()], [0.6]), 0.6 * inject())


def test_strength_zero_adds_the_same_bits_as_no_control():
    x = torch.randn(2, 10, 4)
    for k in range(3):
        assert torch.equal(x + combine([inject()], [0.0])[k], x)


def test_start_and_end_touch_exactly_their_rows():
    result = combine([inject()], [2.0], [0.3], [0.7])
    assert torch.equal(result[:, :, 3:7], 2 * inject()[:, :, 3:7])
    assert torch.count_nonzero(result[:, :, :3]) == torch.count_nonzero(result[:, :, 7:]) == 0


@pytest.mark.parametrize("length", [7, 10, 49, 256])
def test_neighbouring_windows_share_no_row_and_leave_none_out(length):
    for cut in (0.1, 0.3, 1 / 3, 0.7):
        parts = combine([inject(0, length)], [1.0], [0.0], [cut]) + combine([inject(0, length)], [1.0], [cut], [1.0])
        assert torch.equal(parts, inject(0, length))


def test_two_controls_add_where_their_windows_meet():
    first, second = inject(0), inject(1)
    result = combine([first, second], [1.0, -0.5], [0.0, 0.5], [0.8, 1.0])
    assert torch.equal(result[:, :, :5], first[:, :, :5])
    torch.testing.assert_close(result[:, :, 5:8], first[:, :, 5:8] - 0.5 * second[:, :, 5:8])
    assert torch.equal(result[:, :, 8:], -0.5 * second[:, :, 8:])


def test_combine_keeps_dtype_and_gradient():
    leaf = inject().bfloat16().requires_grad_()
    result = combine([leaf], [0.5])
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 0.5))


def test_strength_is_not_rounded_to_bfloat16():
    half = inject().bfloat16()
    assert torch.equal(combine([half], [0.6]), (0.6 * half.double()).bfloat16())


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_strength_must_be_finite(scale):
    with pytest.raises(InputError, match=f"--control-scale {scale}: needs a finite number"):
        combine([inject()], [scale])


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_windows_must_be_windows(start, end):
    with pytest.raises(InputError, match="needs 0 <= start < end <= 1"):
        combine([inject()], [1.0], [start], [end])


def test_options_must_pair_up():
    with pytest.raises(InputError, match="1 values of --control-scale for 2 controls; give one for each"):
        combine([inject(), inject(1)], [1.0])
    with pytest.raises(InputError, match="2 values of --control-end for 1 controls"):
        combine([inject()], [1.0], [0.0], [1.0, 1.0])


# ---------------------------------------------------------------------------------------------------------------------
# Models of several scales


def test_each_scale_reads_area_means_of_the_control_map():
    tokens = torch.randn(2, 12, 5)
    scales = ((1, 1), (2, 2), (2, 3), (4, 3))
    result = at_scales(tokens, (4, 3), scales)
    assert result.shape == (2, 1 + 4 + 6 + 12, 5)
    torch.testing.assert_close(result[:, 0], tokens.mean(1))
    cells = tokens.view(2, 4, 3, 5)
    torch.testing.assert_close(result[:, 5:11], cells.view(2, 2, 2, 3, 5).mean(2).flatten(1, 2))
    torch.testing.assert_close(result[:, 1], cells[:, :2, :2].mean((1, 2)))
    assert torch.equal(result[:, 11:], tokens)


def test_windows_of_scales_take_whole_scales():
    sizes = (1, 4, 5)
    first_two = combine([inject()], [2.0], [0.0], [0.5], sizes)
    assert torch.equal(first_two[:, :, :5], 2 * inject()[:, :, :5]) and not first_two[:, :, 5:].any()
    last = combine([inject()], [1.0], [2 / 3], [1.0], sizes)
    assert torch.equal(last[:, :, 5:], inject()[:, :, 5:]) and not last[:, :, :5].any()
