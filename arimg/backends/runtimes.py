"""Graph files on their runtimes. Inputs are read where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arimg.backends.ops import Array, check_runtime
from arimg.errors import CheckpointError


class Graph(Protocol):
    """A loaded graph, on as many threads as torch computes on when it is loaded.

    `rounds`: whether activations are rounded below float32. Where they are, a sum in another order may end in another
    rounding.
    """

    rounds: bool

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """All outputs, in the order of the graph; they are the caller's own."""


def arrays(inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """The same memory, where it is contiguous."""
    return {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}


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
        inputs, outputs = ({one.name for one in ends} for ends in (self._session.get_inputs(),
                                                                   self._session.get_outputs()))
        if "key_0" in inputs and "new_key_0" not in outputs:
            raise CheckpointError(f"{path}: was exported by an older arimg; export the model again")
        self.rounds = self._session.get_modelmeta().custom_metadata_map.get("weights") != "float32"

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """See Graph."""
        return [torch.from_numpy(output) for output in self._session.run(None, arrays(inputs))]

    def bind(self, names: Sequence[str], stores: Tensor) -> BoundGraph:
        """With inputs of these names in memory that outputs new_NAME are written to, too."""
        return BoundGraph(self._session, names, stores)


class BoundGraph:
    """An OnnxGraph and the memory that it changes."""

    def __init__(self, session: Any, names: Sequence[str], stores: Tensor) -> None:
        self._session, self._stores = session, stores
        self._binding = session.io_binding()
        for name, store in zip(names, stores, strict=True):
            assert store.is_contiguous()
            where = ("cpu", 0, np.float32, tuple(store.shape), store.data_ptr())
            self._binding.bind_input(name, *where)
            self._binding.bind_output(f"new_{name}", *where)

    def holds(self, stores: Tensor) -> bool:
        """Whether it is bound to this very memory."""
        return stores.data_ptr() == self._stores.data_ptr() and stores.shape == self._stores.shape

    def __call__(self, inputs: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
        """The output `name`, float32 of this shape."""
        for key, values in arrays(inputs).items():
            self._binding.bind_cpu_input(key, values)
        output = torch.empty(*shape)
        self._binding.bind_output(name, "cpu", 0, np.float32, tuple(shape), output.data_ptr())
        self._session.run_with_iobinding(self._binding)
        return output


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
        self.rounds = precision != "f32"
        self._request = self._model.create_infer_request()

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """See Graph."""
        outputs = self._request.infer(arrays(inputs), share_inputs=True)
        return [torch.from_numpy(outputs[index]) for index in range(len(self._model.outputs))]


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
