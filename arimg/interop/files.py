"""Original checkpoint files (.pt, .pth, .safetensors) as flat state dicts, read without ever running their code."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arimg.errors import CheckpointError
from arimg.weights import read_safetensors

Weights = Literal["model", "ema"]

# In the order in which LlamaGen's scripts look for them; the last is VAR's and VAR-DD's, inside `trainer`.
WRAPPERS = ("model", "module", "state_dict", "var_wo_ddp")
EMA_WRAPPERS = ("ema", "ema_parameters", "model_ema")
_STRAYS = {"freqs_cis": "the rotary table, computed at run time", "quantize.codebook_used": "training statistics"}
_ALLOWED: list[Any] = [argparse.Namespace]              # training checkpoints keep their command line
_UNPICKLING_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError,
                      ValueError, LookupError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class OriginalFile:
    """A flat state dict and what was left out of it on the way."""

    path: Path
    state: dict[str, Tensor]
    weights: Weights                # which of the two were found and taken
    notices: tuple[str, ...]        # one line each, for the user


def read_original(path: str | Path, weights: Weights = "model") -> OriginalFile:
    """Read one file. `weights`: "model", or "ema" for the exponential moving average where a training file holds one.

    Wrappers (`trainer`; `model`, `module`, `state_dict`, `var_wo_ddp`; `ema`, `ema_parameters`, `model_ema`) and key
    prefixes (`module.`, `_orig_mod.`) are taken off; entries that are no weights are left out with a notice. Raises
    CheckpointError when the file is missing, empty, damaged, no checkpoint, or a pickle that wants to import code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder; give the files in it' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; fetch it again")
    content = read_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a state dict")
    found, taken, notices = _unwrap(path, content, weights)
    state, dropped = _clean(path, found)
    return OriginalFile(path, state, taken, (*notices, *dropped))


def _load_pickle(path: Path) -> Any:
    """torch.load that builds tensors and plain containers only."""
    zipped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # about old formats; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except _UNPICKLING_ERRORS as error:
        unsafe = _unsafe_globals(path, error)
        if unsafe:
            raise CheckpointError(f"{path}: refused, because it is a pickle that runs code: it asks for {unsafe}; only "
                                  "use files with plain tensors, best as .safetensors") from error
        raise CheckpointError(f"{path}: is damaged or not a PyTorch checkpoint ({_reason(error)}); "
                              "fetch it again") from error


def _unsafe_globals(path: Path, error: BaseException) -> str:
    """Names of what the pickle wants to import, empty if nothing. Reads opcodes; runs nothing."""
    named = set(re.findall(r"GLOBAL ([\w.]+)", str(error)))
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            named.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except _UNPICKLING_ERRORS:
        named.update(_stack_globals(path))                  # no zip archive of torch.save: a bare pickle, or damaged
    return ", ".join(sorted(named))


def _stack_globals(path: Path) -> set[str]:
    """What the STACK_GLOBAL opcodes of a bare pickle name, as far as it can be read."""
    named, texts = set(), [""]
    try:
        with path.open("rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STACK_GLOBAL":
                    named.add(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except _UNPICKLING_ERRORS:
        return set()
    return named


def _unwrap(path: Path, content: Mapping[str, Any], weights: Weights) -> tuple[Mapping[str, Any], Weights, list[str]]:
    """The state dict inside the wrappers of training scripts, which weights it holds, and notices about the rest."""
    if isinstance(content.get("trainer"), Mapping):
        content = content["trainer"]
    ema = next((name for name in EMA_WRAPPERS if _is_state(content.get(name))), None)
    chosen = next((name for name in WRAPPERS if _is_state(content.get(name))), ema)
    if chosen is None and not _is_state(content):
        entries = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise CheckpointError(f"{path}: holds no weights, only {entries}; "
                              f"expected a state dict, bare or under {', '.join(WRAPPERS)}")
    if chosen is None:
        return content, "model", []
    notices = []
    if weights == "ema" and ema is not None:
        chosen = ema
    elif ema is not None:
        notices.append(f"{path.name}: also holds EMA weights; --weights ema takes those")
    rest = [str(name) for name in content if name not in (chosen, ema)]
    if rest:
        notices.append(f"{path.name}: left out {', '.join(rest)}")
    return content[chosen], "ema" if chosen == ema else "model", notices


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _clean(path: Path, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors only, without prefixes of wrappers and without entries that are no weights."""
    notices = []
    no_tensors = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if no_tensors:
        notices.append(f"{path.name}: left out {', '.join(no_tensors)}: not tensors")
    tensors = {str(key).replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    for key, reason in _STRAYS.items():
        if tensors.pop(key, None) is not None:
            notices.append(f"{path.name}: left out {key}: {reason}")
    return tensors, notices


def _reason(error: BaseException) -> str:
    """The first sentence of the loader's message, where it is about the file and not about the loader's options."""
    lines = str(error).strip().splitlines()
    if isinstance(error, RuntimeError) and lines and not lines[0].startswith("Cannot use"):
        return lines[0].partition(". ")[0][:160]
    return f"unreadable: {type(error).__name__}"
