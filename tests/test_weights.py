"""Weight files of helper networks: what is read, and one line for everything else."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from arimg.errors import CheckpointError
from arimg.weights import load_strict, read_weights


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_both_formats(tmp_path: Path, name: str) -> None:
    state = nn.Linear(2, 3).half().state_dict()
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    network = load_strict(nn.Linear(2, 3), read_weights(tmp_path / name), tmp_path / name)
    assert network.weight.dtype == torch.float32 and torch.equal(network.weight, state["weight"].float())
    assert not network.training and not network.weight.requires_grad


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Malicious()}))
    torch.save({"weight": Malicious()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(CheckpointError, match="not opened for safety"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = {"weight": torch.zeros(100)}
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged or") as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        read_weights(path)


def test_not_a_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="not a flat table of tensors"):
        read_weights(tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="do not exist"):
        read_weights(tmp_path / "none.pth")


def test_weights_that_do_not_fit() -> None:
    state = {"weight": torch.zeros(3, 3), "other": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_strict(nn.Linear(2, 3), state, Path("net.pth"))
    assert str(error.value) == ("weights 'net.pth' do not fit Linear: 1 missing: bias; 1 unexpected: other; "
                                "1 of another shape: weight (3, 3) instead of (3, 2); give the weights of this network")
