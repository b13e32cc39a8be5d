"""Safe and strict loading of the weights of helper networks: extractors, feature networks, perceptual losses."""

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

_SHOWN = 3      # keys of each kind that a message names

Network = TypeVar("Network", bound=nn.Module)


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth/.pt file that holds a flat state dict.

    Raises CheckpointError: missing, damaged, not a state dict, or a pickle with anything but tensors in it (such a
    file is refused unread: it could run code).
    """
    if not path.is_file():
        raise CheckpointError(f"weights {str(path)!r} do not exist; give the path of a .safetensors or .pth file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # about old formats; what matters raises
            is_safe = path.suffix == ".safetensors"
            state: Any = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"weights {str(path)!r} hold more than tensors or are no torch file, and are not opened "
                              "for safety; give a .safetensors file or a plain state dict") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"weights {str(path)!r} are damaged or cut off ({reason[:200]}); get the file "
                              "again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"weights {str(path)!r} are not a flat table of tensors; give the network's state dict")
    return state


def load_strict(network: Network, state: Mapping[str, Tensor], source: Path) -> Network:
    """Load `state` as float32 and return the network in eval mode without gradients. Raises CheckpointError naming
    the missing, extra and misshapen keys."""
    wanted = network.state_dict()
    faults = {
        "missing": [key for key in wanted if key not in state],
        "extra": [key for key in state if key not in wanted],
        "misshapen": [f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
                      for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    found = [f"{kind} {', '.join(keys[:_SHOWN])}{f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''}"
             for kind, keys in faults.items() if keys]
    if found:
        raise CheckpointError(f"weights {str(source)!r} do not fit {type(network).__name__}: {'; '.join(found)}; "
                              "give the weights of this network")
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval().requires_grad_(False)
