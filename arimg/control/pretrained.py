"""Networks of the transformers library for extraction: from a local folder, or by hub id from the local hub cache.

Extraction never goes to the network by itself: a model that is not on this machine is one `hf download` away, and the
message says so.
"""

from __future__ import annotations

import os
import pickle
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from arimg.control.base import Status
from arimg.errors import CheckpointError, MissingExtraError

EXTRA = "control"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_SHOWN = 3      # missing keys that a message names


def model_status(model: str) -> Status:
    """Whether `model`, a hub id, lies in the local hub cache. Goes to no network."""
    if find_spec("transformers") is None:
        return Status(False, f"transformers is not installed; type: pip install 'arimg[{EXTRA}]'")
    if _is_cached(model, "model.safetensors", "pytorch_model.bin"):
        return Status(True, f"model {model} from the local hub cache")
    return Status(False, f"no local copy of {model}; type: hf download {model}, or give model=FOLDER")


def load_config(model: str, purpose: str) -> Any:
    """The transformers config of `model`, a folder or hub id. Raises MissingExtraError and CheckpointError."""
    if find_spec("transformers") is None:
        raise MissingExtraError(EXTRA, "transformers", purpose)
    if not Path(model).expanduser().is_dir():
        _check_cached(model)
    from transformers import AutoConfig

    return _load(AutoConfig, model)


def load_network(auto_class: Any, model: str) -> tuple[Any, Any]:
    """(image processor, float32 network in eval mode) of `model`. Raises CheckpointError: unreadable, or weights
    missing from the file (which transformers would silently fill with random numbers)."""
    from transformers import AutoImageProcessor

    processor = _load(AutoImageProcessor, model)
    network, report = _load(auto_class, model, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"model {model!r} lacks {len(missing)} weights of {type(network).__name__} "
                              f"({', '.join(missing[:_SHOWN])}, ...); give a model that was trained for this")
    return processor, network.eval().float().requires_grad_(False)


def _load(auto_class: Any, model: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(os.path.expanduser(model), local_files_only=True, **options)
    except ImportError as error:                         # some models need more than transformers, e.g. scipy
        raise CheckpointError(f"model {model!r} cannot be built here ({_one_line(error)}); type: pip install "
                              f"'arimg[{EXTRA}]', or choose another model") from None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"model {model!r} cannot be loaded ({_one_line(error)}); give a complete folder with "
                              "config.json, preprocessor_config.json and model.safetensors") from None


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _check_cached(model: str) -> None:
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"model folder {model!r} does not exist; give a folder with config.json, or a hub id "
                              "such as owner/name")
    if not _is_cached(model, "config.json"):
        raise CheckpointError(f"model {model!r} is neither a folder nor in the local hub cache; type: hf download "
                              f"{model}, or give model=FOLDER")


def _is_cached(model: str, *files: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(model, file), str) for file in files)
