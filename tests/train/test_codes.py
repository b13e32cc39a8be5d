"""The token cache: encoded once, never mixed up between tokenizers."""

import numpy as np
import pytest
import torch

from arimg.data import to_images
from arimg.errors import ConfigError
from arimg.tokenizers.vq import VQConfig, VQTokenizer
from arimg.train.codes import CodeCache, tokenizer_hash

CONFIG = VQConfig(codebook_size=16, codebook_dim=4, base_channels=32, multipliers=(1, 1), res_blocks=1, z_channels=8)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return VQTokenizer(CONFIG).eval()


def test_codes_are_those_of_the_tokenizer_in_the_order_asked_for(tmp_path, tokenizer):
    cache = CodeCache(tmp_path, IMAGES, tokenizer, "data")
    expected_BL = tokenizer.encode(to_images(IMAGES)).codes_BL
    assert torch.equal(cache.get(np.array([3, 0, 3])), expected_BL[[3, 0, 3]])
    assert cache.grid == (4, 4)


def test_mirror_images_have_the_codes_of_the_mirror_image(tmp_path, tokenizer):
    cache = CodeCache(tmp_path, IMAGES, tokenizer, "data")
    mirrored = IMAGES[:, :, ::-1]
    expected_BL = tokenizer.encode(to_images(mirrored)).codes_BL
    np.testing.assert_array_equal(cache.pixels(np.array([7, 2])), [mirrored[2], IMAGES[2]])
    assert torch.equal(cache.get(np.array([5, 9, 7])), expected_BL[[0, 4, 2]])
    assert not torch.equal(expected_BL, cache.get(np.arange(5)))


def test_the_file_holds_sixteen_bits_and_the_rest_is_unknown(tmp_path, tokenizer):
    CodeCache(tmp_path, IMAGES, tokenizer, "data").get(np.array([1]))
    (path,) = tmp_path.iterdir()
    assert path.name == f"codes-data-{tokenizer_hash(tokenizer)}.u16.npy"
    codes = np.load(path)
    assert codes.dtype == np.uint16 and codes.shape == (10, 16)
    assert (codes[1] < 16).all() and (np.delete(codes, 1, axis=0) == 65535).all()


def test_a_codebook_too_large_for_sixteen_bits_is_one_line(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(VQTokenizer, "vocab_size", 65536)
    with pytest.raises(ConfigError, match="tokenizer of 65536 codes.*smaller codebook") as caught:
        CodeCache(tmp_path, IMAGES, tokenizer, "data")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_second_cache_reads_what_the_first_encoded(tmp_path, tokenizer, monkeypatch):
    first = CodeCache(tmp_path, IMAGES, tokenizer, "data").get(np.arange(5))
    second = CodeCache(tmp_path, IMAGES, tokenizer, "data")
    monkeypatch.setattr(VQTokenizer, "encode", None)
    assert torch.equal(second.get(np.arange(5)), first)


def test_another_tokenizer_or_data_set_gets_a_file_of_its_own(tmp_path, tokenizer):
    CodeCache(tmp_path, IMAGES, tokenizer, "data")
    CodeCache(tmp_path, IMAGES, tokenizer, "other-data")
    with torch.no_grad():
        tokenizer.encoder.conv_in.bias += 1
    CodeCache(tmp_path, IMAGES, tokenizer, "data")
    assert len(list(tmp_path.glob("codes-*.npy"))) == 3


def test_the_hash_ignores_the_decoder_which_does_not_change_codes(tokenizer):
    before = tokenizer_hash(tokenizer)
    with torch.no_grad():
        tokenizer.decoder.conv_in.bias += 1
    assert tokenizer_hash(tokenizer) == before
    with torch.no_grad():
        tokenizer.quantize.embedding.weight += 1
    assert tokenizer_hash(tokenizer) != before
