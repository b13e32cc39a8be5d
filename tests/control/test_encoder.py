"""The control encoder: grids, positions, resizing, types, errors. Equality with transformers: tests/interop."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from arimg.control.encoder import ControlEncoder, EncoderConfig, interpolate_positions, sincos_positions
from arimg.errors import ConfigError, InputError

SMALL = EncoderConfig(embed_dim=16, depth=2, heads=2, ffn_hidden=24, patch=8, stride=8)
VIT = EncoderConfig(kind="vit", embed_dim=16, depth=2, heads=2, ffn_hidden=24, patch=16, stride=16, image_size=48)
DINOV2 = EncoderConfig(kind="dinov2", embed_dim=16, depth=2, heads=2, ffn_hidden=24, patch=14, stride=16, image_size=70)


def build(config, **changes):
    torch.manual_seed(0)
    encoder = ControlEncoder(EncoderConfig(**{**config.__dict__, **changes})).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def maps(*size, rows=2):
    return torch.rand(rows, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("config", [SMALL, VIT, DINOV2], ids=lambda config: config.kind)
@pytest.mark.parametrize("size", [(48, 48), (96, 160), (16, 32)])
def test_one_token_per_image_token(config, size):
    tokens_BLE = build(config)(maps(*size))
    assert tokens_BLE.shape == (2, size[0] // config.stride * (size[1] // config.stride), 16)


@pytest.mark.parametrize("config", [SMALL, VIT, DINOV2], ids=lambda config: config.kind)
def test_a_map_reads_alike_alone_and_in_a_batch(config):
    encoder, batch = build(config).double(), maps(32, 64, rows=3).double()
    torch.testing.assert_close(encoder(batch)[2:], encoder(batch[2:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, VIT, DINOV2], ids=lambda config: config.kind)
def test_bfloat16_weights_give_bfloat16_tokens_near_the_float32_ones(config):
    encoder = build(config)
    exact = encoder(maps(64, 96))
    rough = encoder.bfloat16()(maps(64, 96))
    assert rough.dtype == torch.bfloat16
    assert F.cosine_similarity(rough.float(), exact, dim=2).min() > 0.99


@pytest.mark.parametrize("config", [SMALL, VIT, DINOV2], ids=lambda config: config.kind)
def test_every_parameter_is_trained(config):
    encoder = build(config)
    encoder(maps(32, 32)).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("config", [SMALL, VIT, DINOV2], ids=lambda config: config.kind)
def test_no_state_outside_the_state_dict(config):
    with torch.device("meta"):
        encoder = ControlEncoder(config)
    encoder.load_state_dict(build(config).state_dict(), assign=True)
    torch.testing.assert_close(encoder(maps(32, 32)), build(config)(maps(32, 32)), rtol=0, atol=0)


def test_ffn_hidden_is_met_exactly_for_every_ratio():
    for hidden in (1, 7, 24, 999, 1000, 1536):
        encoder = ControlEncoder(EncoderConfig(embed_dim=384, depth=1, heads=6, ffn_hidden=hidden))
        assert encoder.vit.blocks[0].mlp.fc1.out_features == hidden


def test_norm_eps_of_each_kind():
    eps = {config.kind: {module.eps for module in build(config).modules() if isinstance(module, torch.nn.LayerNorm)}
           for config in (VIT, DINOV2, SMALL)}
    assert eps == {"vit": {1e-12}, "dinov2": {1e-6}, "small": {1e-6}}


def test_sincos_positions_by_hand():
    table_LE = sincos_positions((2, 3), 8, torch.device("cpu"))
    assert table_LE.shape == (6, 8)
    row, column = 1.0, 2.0                              # the last cell
    angles = torch.tensor([row, row / 100])             # frequencies 1 and 10000^(-1/2)
    torch.testing.assert_close(table_LE[5, :4], torch.cat([angles.sin(), angles.cos()]))
    angles = torch.tensor([column, column / 100])
    torch.testing.assert_close(table_LE[5, 4:], torch.cat([angles.sin(), angles.cos()]))


def test_sincos_positions_do_not_depend_on_the_grid():
    small, large = (sincos_positions(grid, 16, torch.device("cpu")).unflatten(0, grid) for grid in ((3, 4), (5, 9)))
    assert torch.equal(small, large[:3, :4])


def test_table_at_its_own_grid_is_untouched():
    table_1LE = torch.randn(1, 9, 4)
    assert interpolate_positions(table_1LE, (3, 3)) is table_1LE


def test_table_resampling_is_bicubic_without_antialiasing():
    table_1LE = torch.randn(1, 64, 4)
    grid_1Ehw = table_1LE.reshape(1, 8, 8, 4).permute(0, 3, 1, 2)
    result = interpolate_positions(table_1LE, (3, 2)).transpose(1, 2).reshape(1, 4, 3, 2)
    plain = F.interpolate(grid_1Ehw, (3, 2), mode="bicubic")
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    assert (result - F.interpolate(grid_1Ehw, (3, 2), mode="bicubic", antialias=True)).abs().max() > 0.1


@pytest.mark.parametrize("resample, kwargs", [("nearest", {"mode": "nearest"}),
                                              ("bicubic", {"mode": "bicubic", "align_corners": True})])
def test_dinov2_sees_fourteen_pixels_for_sixteen(resample, kwargs):
    encoder, image = build(DINOV2), maps(32, 64)
    at_14 = build(DINOV2, stride=14)
    torch.testing.assert_close(encoder(image, resample), at_14(F.interpolate(image, (28, 56), **kwargs)))


def test_defect_19_nearest_resize_mixes_no_label_colours():
    colours = torch.tensor([[-1.0, 0.2, 1.0], [0.5, -0.3, 0.1], [1.0, 1.0, -0.7]])
    labels = torch.randint(3, (1, 64, 48), generator=torch.Generator().manual_seed(0))
    image = colours[labels].permute(0, 3, 1, 2)
    resized = build(DINOV2)._resized(image, "nearest")
    assert resized.shape == (1, 3, 56, 42)
    assert len(torch.unique(resized.flatten(2), dim=2)[0].T) == 3
    assert len(torch.unique(build(DINOV2)._resized(image, "bicubic").flatten(2), dim=2)[0].T) > 3


def test_type_changes_the_tokens_of_its_own_row_only():
    encoder = build(SMALL, types=("canny", "depth"))
    image = maps(16, 16)
    base = encoder(image, type_ids_B=torch.tensor([0, 0]))
    changed = encoder(image, type_ids_B=torch.tensor([0, 1]))
    torch.testing.assert_close(changed[0], base[0])
    assert (changed[1] - base[1]).abs().max() > 1e-3


def test_missing_type_names_the_choices():
    with pytest.raises(InputError, match="give one of canny, depth"):
        build(SMALL, types=("canny", "depth"))(maps(16, 16))


def test_controlar_encoders_share_one_checkpoint_among_types_without_being_told():
    encoder = build(DINOV2, types=("canny", "hed", "lineart"))
    assert encoder.type_embed is None
    assert encoder(maps(32, 32)).shape == (2, 4, 16)


@pytest.mark.parametrize("size, fix", [((30, 48), "32 x 48"), ((3, 100), "8 x 96"), ((48, 45), "48 x 48")])
def test_size_off_the_stride_names_the_nearest(size, fix):
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]}: both sides must be multiples of 8; use {fix}"):
        build(SMALL)(maps(*size))


@pytest.mark.parametrize("fields, words", [
    ({"kind": "resnet"}, "'resnet' is unknown; use one of vit, dinov2, small"),
    ({"embed_dim": 100, "heads": 3}, "100 is not a multiple of heads 3"),
    ({"embed_dim": 18, "heads": 3}, "use 20"),
    ({"kind": "vit", "image_size": None}, "no position table"),
    ({"kind": "dinov2", "image_size": 8, "patch": 14}, "at least one patch of 14 pixels"),
    ({"types": ()}, "types is empty"),
])
def test_config_errors(fields, words):
    with pytest.raises(ConfigError, match=words):
        EncoderConfig(**fields)


def test_small_blocks_are_those_of_timm():
    from timm.models.vision_transformer import VisionTransformer

    config = EncoderConfig(embed_dim=32, depth=3, heads=4, ffn_hidden=48, patch=4, stride=4)
    torch.manual_seed(0)
    ours = ControlEncoder(config).vit
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5,
                               num_classes=0, class_token=False, pos_embed="none", global_pool="")
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, 16, 16)
    x = ours.patch_embed(pixels).flatten(1, 2)
    torch.testing.assert_close(ours.norm(ours.blocks(x)), theirs.eval()(pixels), rtol=1e-5, atol=1e-5)


def test_the_small_encoder_does_not_import_timm():
    program = ("import sys; from arimg.control.encoder import ControlEncoder, EncoderConfig; "
               "ControlEncoder(EncoderConfig()); sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
