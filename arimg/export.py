"""Pipeline folders whose transformer and tokenizer run on ONNX Runtime or OpenVINO (`arimg export`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from arimg.backends.graphs import decoder_graph, new_ops, step_graph
from arimg.backends.ops import WEIGHTS, check_runtime
from arimg.backends.runtimes import GRAPHS
from arimg.checkpoints import (INDEX, Index, find_model, load_component, load_state, read_index, save_component,
                               staged_folder, write_index)
from arimg.errors import InputError, UnknownNameError
from arimg.models.ar import ARTransformer
from arimg.registry import MODELS, TOKENIZERS
from arimg.tokenizers.vq import VQTokenizer


def export_pipeline(model: str | Path, runtime: str, weights: str, folder: str | Path, keep_tokenizer: bool = False,
                    notify: Callable[[str], None] = lambda line: None) -> Path:
    """Write `model` (an embedded model, a pipeline folder or a hub id) for a runtime, or nothing; an older pipeline
    folder of that name is replaced.

    `weights` float32, int8 or int4 is how the graph of the transformer stores its matrices. `keep_tokenizer` copies the
    tokenizer as it is. `notify` is told what is going on. Raises UnknownNameError, MissingExtraError, CheckpointError,
    and InputError for networks without a graph.
    """
    check_runtime(runtime)
    if weights not in WEIGHTS:
        raise UnknownNameError("weights", weights, WEIGHTS)
    source, folder = find_model(model), Path(folder)
    index = read_index(source)
    if source.resolve() == folder.resolve():
        raise InputError(f"{folder}: is the model itself; give another folder")
    components = {}
    with staged_folder(folder, INDEX) as stage:
        for name, (library, class_name) in index.components.items():
            notify(f"{name}: {class_name}")
            if name == "transformer" or name == "tokenizer" and not keep_tokenizer:
                network = load_component(source / name)
                exported = export_component(network, runtime, weights, stage / name)
                components[name] = ("arimg.hub", exported)
            else:
                shutil.copytree(source / name, stage / name)
                components[name] = (library, class_name)
        write_index(stage, Index(components, index.settings))
    return folder


def export_component(network: nn.Module, runtime: str, weights: str, folder: Path) -> str:
    """Write the tables and the graph of one network into an empty or new folder; returns the class that loads it.
    Raises InputError for networks without a graph."""
    ops: Any
    if isinstance(network, ARTransformer):
        ops, name = new_ops(runtime, weights), f"{runtime.capitalize()}Transformer"
        step_graph(ops, network)
        host = MODELS.load(name)(network.config)
        state = {"tok_embeddings.weight": network.embedding_table(),
                 **{f"cls_embedding.{key}": value for key, value in network.cls_embedding.state_dict().items()}}
    elif isinstance(network, VQTokenizer):
        ops, name = new_ops(runtime), f"{runtime.capitalize()}Tokenizer"
        decoder_graph(ops, network)
        host = TOKENIZERS.load(name)(network.config)
        state = {f"quantize.{key}": value for key, value in network.quantize.state_dict().items()}
    else:
        raise InputError(f"{type(network).__name__}: arimg export writes ARTransformer and VQTokenizer networks, token "
                         "by token; run this model as it is, with --quantize or --dtype for speed")
    load_state(host, {key: value.float() for key, value in state.items()}, str(folder))
    save_component(host, folder)
    ops.write(folder / f"{host.graph_name}{GRAPHS[runtime].suffix}")
    return name
