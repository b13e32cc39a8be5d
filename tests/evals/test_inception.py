"""Inception as ADM's evaluator reads it: the layout of the spatial features, and where its weights come from."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from arimg.errors import CheckpointError, InputError, MissingExtraError
from arimg.evals.extractors import AdmInception, find_extractor
from arimg.features import inception_file

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, of the right shapes: the network is built with its download replaced by nothing."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save(module.FeatureExtractorInceptionV3("any", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> AdmInception:
    return AdmInception(weights=str(weights))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ARIMG_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@torch.no_grad()
def test_spatial_features_are_seven_channels_with_channels_last(extractor: AdmInception) -> None:
    """2023 = 17 x 17 x 7, channels last: the other layout gave sFID 299 instead of 6 (guided-diffusion#109)."""
    found = extractor(PIXELS)
    assert found.pool_NC.shape == (2, 2048) and found.logits_NK.shape == (2, 1008)
    network = extractor._network.network
    kept: list[torch.Tensor] = []
    handle = network.Mixed_6d.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    pool, logits = network(torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    handle.remove()
    branch_BCHW = network.Mixed_6d.branch1x1(kept[0])
    expected = np.stack([[branch_BCHW[k, c, y, x] for y in range(17) for x in range(17) for c in range(7)]
                         for k in range(2)])
    assert found.spatial_NS.shape == (2, 2023)
    np.testing.assert_allclose(found.spatial_NS, expected, rtol=1e-6)
    wrong = branch_BCHW[:, :7].flatten(1).numpy()
    assert not np.allclose(found.spatial_NS, wrong)
    np.testing.assert_allclose(found.pool_NC, pool)
    np.testing.assert_allclose(found.logits_NK, logits)


@torch.no_grad()
def test_logits_have_no_bias(extractor: AdmInception) -> None:
    found, layer = extractor(PIXELS), extractor._network.network.fc
    np.testing.assert_allclose(found.logits_NK, found.pool_NC @ layer.weight.numpy().T, rtol=1e-3, atol=1e-5)
    assert layer.bias.abs().max() > 1e-3


def test_other_weights_are_called_so(weights: Path, caplog: pytest.LogCaptureFixture,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arimg.evals.extractors.Inception", lambda path: torch.nn.Identity())
    with caplog.at_level(logging.WARNING, "arimg"):
        found = find_extractor("inception", inception=str(weights))
    assert not found.published and "not the published Inception weights" in caplog.text
    assert len(found.describe()["weights_sha256"]) == 64


def test_weights_from_the_environment(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIMG_INCEPTION", str(weights))
    assert inception_file() == weights


def test_no_weights_is_one_line_that_says_where_to_get_them() -> None:
    with pytest.raises(CheckpointError) as caught:
        inception_file()
    text = str(caught.value)
    assert "weights-inception-2015-12-05-6726825d.pth does not exist" in text and "\n" not in text
    assert "--inception FILE" in text and "https://" in text and "--inception download" in text


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(CheckpointError, match="cannot be fetched .no route.; fetch it elsewhere"):
        inception_file("download")


def test_a_download_lands_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, path, hash_prefix: Path(path).write_text(hash_prefix))
    fetched = inception_file("download")
    assert fetched.read_text() == "6726825d" and inception_file() == fetched


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file; give weights-inception"):
        inception_file(str(tmp_path / "nowhere.pth"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="are not those of FID's Inception"):
        AdmInception(weights=str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="beside --extractor effnet_lite0"):
        find_extractor("effnet_lite0", inception="x.pth")
    monkeypatch.setattr("arimg.features.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs torch-fidelity.*arimg\[eval\]"):
        inception_file()
