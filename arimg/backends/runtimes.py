"""Graph files on their runtimes. Inputs and outputs are arrays; inputs are read where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from arimg.backends.ops import Array, check_runtime
from arimg.errors import CheckpointError


class Graph(Protocol):
    """A loaded graph, on as many threads as torch computes on when it is loaded.

    `exact`: whether activations are never rounded below float32. Where they are, sums in another order end in other
    roundings, so that a pass over many positions gives other laws than passes over one each.
    """

    exact: bool

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs, in the order of the graph; they are the caller's own."""


class OnnxGraph:
    """ONNX Runtime on the CPU."""

    suffix = ".onnx"

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What a damaged or foreign file raises."""
        from onnxruntime.capi import onnxruntime_pybind11_state as state
        return (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
                state.NotImplemented, state.RuntimeException)

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """It computes in float32 whatever `dtype`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3          # errors
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.exact = self._session.get_modelmeta().custom_metadata_map.get("weights") == "float32"

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """See Graph."""
        outputs: list[Array] = self._session.run(None, dict(inputs))
        return outputs


class OpenvinoGraph:
    """OpenVINO on the CPU."""

    suffix = ".xml"

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What a damaged or foreign file raises."""
        return (RuntimeError,)

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """`dtype` bfloat16 lets it multiply in bfloat16; else all is float32, activations of 8-bit weights too."""
        import openvino

        core = openvino.Core()
        precision = "bf16" if dtype == torch.bfloat16 else "f32"
        self._model = core.compile_model(core.read_model(path), "CPU", {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
        self.exact = precision == "f32"
        self._request = self._model.create_infer_request()

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """See Graph."""
        outputs = self._request.infer(dict(inputs), share_inputs=True)
        return [outputs[index] for index in range(len(self._model.outputs))]


GRAPHS: dict[str, type[Any]] = {"onnx": OnnxGraph, "openvino": OpenvinoGraph}


def load_graph(runtime: str, folder: Path, name: str, dtype: torch.dtype) -> Graph:
    """The graph `name` of a component's folder. Raises MissingExtraError and CheckpointError."""
    check_runtime(runtime)
    kind = GRAPHS[runtime]
    path = folder / f"{name}{kind.suffix}"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the folder is not complete, so export the model again")
    try:
        graph: Graph = kind(path, dtype)
    except kind.errors() as error:
        raise CheckpointError(f"{path}: {runtime} cannot load it ({str(error).splitlines()[0][:160]}); "
                              "export the model again") from error
    return graph
