"""Weight files read safely, and fitted to networks strictly: every key that does not fit is an error."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from arimg.errors import CheckpointError

_SHOWN = 20     # keys of each kind that a message names

Network = TypeVar("Network", bound=nn.Module)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises CheckpointError when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged or not a safetensors file ({_one_line(error)}); "
                              "fetch or write it again") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth/.pt file that holds a flat state dict.

    Raises CheckpointError: missing, damaged, not a state dict, or a pickle with anything but tensors in it (such a
    file is refused unread: it could run code).
    """
    if not path.is_file():
        raise CheckpointError(f"weights {str(path)!r} do not exist; give the path of a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # about old formats; what matters raises
            state: Any = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"weights {str(path)!r} hold more than tensors or are no torch file, and are not opened "
                              "for safety; give a .safetensors file or a plain state dict") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"weights {str(path)!r} are damaged or cut off ({_one_line(error)}); get the file "
                              "again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"weights {str(path)!r} are not a flat table of tensors; give the network's state dict")
    return state


def check_keys(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Raises CheckpointError "what: the missing, unexpected and misshapen keys of `state`; advice" unless all fit."""
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
                             for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    found = [f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
             for kind, keys in faults.items() if keys]
    if found:
        raise CheckpointError(f"{what}: {'; '.join(found)}; {advice}")


def load_strict(network: Network, state: Mapping[str, Tensor], source: Path) -> Network:
    """Load `state` as float32 and return the network in eval mode without gradients. Raises CheckpointError naming
    the missing, unexpected and misshapen keys."""
    check_keys(network.state_dict(), state, f"weights {str(source)!r} do not fit {type(network).__name__}",
               "give the weights of this network")
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval().requires_grad_(False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
