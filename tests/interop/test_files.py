"""Original checkpoint files: what is unwrapped, what is left out, and that no file can run code."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arimg.errors import CheckpointError
from arimg.interop.files import read_original

STATE = {"norm.weight": torch.arange(3.0), "output.weight": torch.eye(2)}
EMA = {"norm.weight": torch.zeros(3), "output.weight": torch.zeros(2, 2)}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def same(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


def saved(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_training_file_with_namespace_and_ema(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "gpt.pt", {"model": STATE, "ema": EMA, "steps": 3, "args": argparse.Namespace(lr=1e-4),
                                       "optimizer": {"state": {0: torch.ones(2)}}}, legacy)
    original = read_original(path)
    assert same(original.state, STATE)
    assert original.notices == ("gpt.pt: also holds EMA weights; --weights ema takes those",
                                "gpt.pt: left out steps, args, optimizer")
    averaged = read_original(path, "ema")
    assert same(averaged.state, EMA) and averaged.weights == "ema"
    assert averaged.notices == ("gpt.pt: left out model, steps, args, optimizer",)


def test_a_file_without_average_says_which_weights_it_gave(tmp_path: Path) -> None:
    for content in ({"model": STATE}, STATE):
        original = read_original(saved(tmp_path / "x.pt", content), "ema")
        assert same(original.state, STATE) and original.weights == "model"


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
def test_wrappers(tmp_path: Path, wrapper: str) -> None:
    assert same(read_original(saved(tmp_path / "x.pth", {wrapper: STATE})).state, STATE)


def test_bare_state_dicts(tmp_path: Path) -> None:
    assert same(read_original(saved(tmp_path / "consolidated.pth", STATE)).state, STATE)
    save_file(STATE, tmp_path / "x.safetensors")
    assert same(read_original(tmp_path / "x.safetensors").state, STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "x.pt", {"model": {f"{prefix}{key}": tensor for key, tensor in STATE.items()}})
    assert same(read_original(path).state, STATE)


def test_strays_are_left_out_with_a_notice(tmp_path: Path) -> None:
    strays = {"freqs_cis": torch.zeros(3), "quantize.codebook_used": torch.zeros(4), "epoch": 3}
    original = read_original(saved(tmp_path / "x.pt", {**STATE, **strays}))
    assert same(original.state, STATE)
    assert original.notices == ("x.pt: left out epoch: not tensors",
                                "x.pt: left out freqs_cis: the rotary table, computed at run time",
                                "x.pt: left out quantize.codebook_used: training statistics")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 4"])
def test_pickles_with_code_are_refused_and_never_run(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"model": STATE, "extra": Payload(marker)}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Payload(marker), protocol=int(kind[-1])))
    else:
        saved(path, content, legacy=kind == "legacy")
    with pytest.raises(CheckpointError) as caught:
        read_original(path)
    assert not marker.exists()
    text = str(caught.value)
    assert "refused, because it is a pickle that runs code: it asks for" in text and "system" in text
    assert "\n" not in text


def test_pickled_modules_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it asks for torch\.nn\.modules\.linear\.Linear"):
        read_original(saved(tmp_path / "x.pt", torch.nn.Linear(2, 2)))


def damaged(tmp_path: Path) -> dict[str, bytes]:
    modern = saved(tmp_path / "modern.pt", {"model": STATE}).read_bytes()
    old = saved(tmp_path / "old.pt", {"model": STATE}, legacy=True).read_bytes()
    save_file(STATE, tmp_path / "x.safetensors")
    tensors = (tmp_path / "x.safetensors").read_bytes()
    return {"truncated.pt": modern[:len(modern) // 2], "truncated_old.pt": old[:-9], "head_of_old.pt": old[:60],
            "overwritten.pt": modern[:60] + b"\xff" * 40 + modern[100:], "text.pt": b"<html>404</html>" * 9,
            "truncated.safetensors": tensors[:-5], "text.safetensors": b"<html>404</html>" * 9}


@pytest.mark.parametrize("name", ["truncated.pt", "truncated_old.pt", "head_of_old.pt", "overwritten.pt", "text.pt",
                                  "truncated.safetensors", "text.safetensors"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(damaged(tmp_path)[name])
    with pytest.raises(CheckpointError) as caught:
        read_original(path)
    assert str(caught.value).startswith(f"{path}: is damaged or not a ") and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    cases = {tmp_path / "none.pt": "no such file", tmp_path: "is a folder", tmp_path / "empty.pt": "is empty",
             saved(tmp_path / "list.pt", [1]): "holds list, not a state dict",
             saved(tmp_path / "no.pt", {"a": 1}): "holds no weights, only a; expected a state dict"}
    for path, text in cases.items():
        with pytest.raises(CheckpointError) as caught:
            read_original(path)
        assert text in str(caught.value)
