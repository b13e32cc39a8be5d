"""Pipeline folders in the diffusers layout, read and written without diffusers.

    model_index.json                  {"_class_name": "ArimgPipeline", "tokenizer": ["arimg.hub", "VQTokenizer"], ...,
                                       "decoders": {"dd1": ["arimg.hub", "ARStudent"]}, "settings": {...}}
    tokenizer/config.json             {"_class_name": "VQTokenizer", "codebook_size": 16384, ...}
    tokenizer/diffusion_pytorch_model.safetensors          or shards, listed in ....safetensors.index.json
    transformer/ ...  control/ ...  text_encoder/ ...
    decoders/dd1/ ...                 a network that this decoder needs beside the transformer

Networks are built on the meta device and take the tensors of the file, every key of which must fit.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arimg.config import from_dict, to_dict
from arimg.errors import CheckpointError, ConfigError, UnknownNameError
from arimg.registry import CONTROL_MODULES, MODELS, TOKENIZERS
from arimg.weights import check_keys, read_safetensors

INDEX = "model_index.json"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SECOND = "decoders/"        # before the name of a component that a decoder of this name needs
PIPELINE_CLASS = "ArimgPipeline"

_WEIGHT_NAMES = (WEIGHTS, "model.safetensors")
_LIBRARIES = ("arimg", "diffusers", "transformers")        # what an index may name: it is a stranger's file
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.onnx", "*.onnx.data",
                 "*.xml", "*/step.bin", "*/decoder.bin"]     # OpenVINO's numbers; other .bin files are pickles


@dataclass(frozen=True)
class PipelineSettings:
    """What a pipeline folder says besides its networks: where it comes from and its defaults for a call."""

    title: str = ""
    source: str = ""                        # papers, repositories, data
    licence: str = ""
    class_names: tuple[str, ...] = ()       # index = class id
    control_types: tuple[str, ...] = ()     # types of map that the control component was trained on
    size: tuple[int, int] = (256, 256)      # (height, width) in pixels
    decoder: str = "ar"
    cfg: float = 1.0
    control_cfg: float | None = None
    guidance_order: str = "class-first"     # or control-first, see arimg/accel/target.py
    plausibility: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Index:
    """The content of model_index.json."""

    components: dict[str, tuple[str, str]]      # name = sub-folder -> (library, class)
    settings: PipelineSettings = PipelineSettings()

    @property
    def second_networks(self) -> tuple[str, ...]:
        """Names of the decoders that have a network of their own."""
        return tuple(name.removeprefix(SECOND) for name in self.components if name.startswith(SECOND))


@dataclass(frozen=True)
class ModelInfo:
    """An embedded model."""

    name: str
    folder: Path
    settings: PipelineSettings
    bytes: int                                  # of all its files
    decoders: tuple[str, ...] = ()              # that have a network of their own in it


def list_models() -> list[ModelInfo]:
    """The models that ship inside the package, by name."""
    assets = Path(str(files("arimg"))) / "assets"
    folders = sorted(path.parent for path in assets.glob(f"*/{INDEX}"))
    return [_model_info(folder) for folder in folders]


def _model_info(folder: Path) -> ModelInfo:
    index = read_index(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ModelInfo(folder.name, folder, index.settings, size, index.second_networks)


def find_model(name: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The pipeline folder behind an embedded model's name, a path, or a hub id `owner/name` (downloaded and cached).

    Raises UnknownNameError on a name that is none of these, CheckpointError on a path without a pipeline folder and on
    a hub id that cannot be fetched.
    """
    embedded = Path(str(files("arimg"))) / "assets"
    text, path = str(name), Path(name).expanduser()
    if isinstance(name, str) and path.name == text and (embedded / text / INDEX).is_file():
        return embedded / text
    if path.is_file():
        raise CheckpointError(f"{name}: is a file, not a pipeline folder; original weights become one by: "
                              f"arimg convert --from llamagen {name} ... -o FOLDER")
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise CheckpointError(f"{name}: has no {INDEX}; give a folder written by arimg convert or save_pretrained")
        return path
    if text.count("/") == 1 and text[0] not in "./~" and not text.endswith("/"):
        return _download(text, revision, local_files_only)
    if "/" in text or path.is_absolute():
        raise CheckpointError(f"{name}: no such folder; give a pipeline folder, a hub id owner/name or one of "
                              f"{', '.join(model.name for model in list_models()) or 'no embedded models'}")
    raise UnknownNameError("model", text, [model.name for model in list_models()])


def _download(hub_id: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, revision=revision, local_files_only=local_files_only,
                                   allow_patterns=_HUB_PATTERNS)
    except (OSError, ValueError) as error:              # every error of huggingface_hub is one of the two
        raise CheckpointError(f"{hub_id}: no such folder here, and the hub did not give it ({_one_line(error)}); "
                              "check the name and the network, or give a local folder") from error
    return Path(folder)


def read_index(folder: Path) -> Index:
    """Components and settings of a pipeline folder. Raises CheckpointError."""
    path = Path(folder) / INDEX
    content = _read_json(path)
    components = {}
    for name, entry in _entries(path, content).items():
        if entry in (None, [None, None]):
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise CheckpointError(f"{path}: entry {name!r} is {entry!r}; a component is [library, class]")
        if entry[0].partition(".")[0] not in _LIBRARIES:
            raise CheckpointError(f"{path}: component {name!r} wants code from {entry[0]!r}; "
                                  f"only {', '.join(_LIBRARIES)} are trusted")
        components[name] = (entry[0], entry[1])
    try:
        settings = from_dict(PipelineSettings, content.get("settings") or {})
    except ConfigError as error:
        raise CheckpointError(f"{path}: settings: {error}") from error
    return Index(components, settings)


def _entries(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What an index says of components, by sub-folder. Raises CheckpointError."""
    entries = {name: entry for name, entry in content.items() if not name.startswith("_") and name != "settings"}
    second = entries.pop(SECOND.rstrip("/"), None) or {}
    if not isinstance(second, dict) or not all(re.fullmatch(r"[\w-]+", name) for name in second):
        raise CheckpointError(f"{path}: decoders is {second!r}; it maps names of decoders to [library, class]")
    return entries | {f"{SECOND}{name}": entry for name, entry in second.items()}


def write_index(folder: Path, index: Index) -> None:
    """Write model_index.json."""
    content: dict[str, Any] = {"_class_name": PIPELINE_CLASS}
    content.update({name: list(entry) for name, entry in index.components.items() if not name.startswith(SECOND)})
    if index.second_networks:
        content[SECOND.rstrip("/")] = {name: list(index.components[SECOND + name]) for name in index.second_networks}
    content["settings"] = to_dict(index.settings)
    _write_json(Path(folder) / INDEX, content)


def save_pipeline(folder: str | Path, components: Mapping[str, Any], settings: PipelineSettings,
                  dtype: torch.dtype | None = None) -> Path:
    """Write a whole pipeline folder, or nothing; an older pipeline folder of that name is replaced.

    `components`: name -> network of ours, or any object with its own `save_pretrained` (text encoder, text tokenizer);
    "decoders/dd1" is the network that the decoder dd1 needs.
    `dtype` casts our networks' floating-point tensors. Raises CheckpointError when it cannot be written.
    """
    folder = Path(folder)
    with staged_folder(folder, INDEX) as stage:
        entries = {}
        for name, component in components.items():
            library = type(component).__module__.partition(".")[0]
            if hasattr(component, "save_pretrained"):
                component.save_pretrained(stage / name)
            else:
                save_component(component, stage / name, dtype)
            entries[name] = (library if library == "transformers" else "arimg.hub", type(component).__name__)
        write_index(stage, Index(entries, settings))
    return folder


def save_component(module: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write one network, or nothing: config.json and safetensors, cast to `dtype` if given. Raises CheckpointError."""
    state = {key: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
             for key, tensor in module.state_dict().items()}
    with staged_folder(Path(folder), CONFIG) as stage:
        _write_json(stage / CONFIG, {"_class_name": type(module).__name__, **to_dict(module.config)})
        try:
            save_file(state, stage / WEIGHTS, metadata={"format": "pt"})        # diffusers insists on the metadata
        except SafetensorError as error:
            raise CheckpointError(f"{folder}: cannot be written ({_one_line(error)})") from error


def load_component(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Any:
    """One network of a pipeline folder, in eval mode; `dtype` None keeps that of the file.

    Raises CheckpointError when a file is missing or damaged, the config does not fit the class, or a key is missing,
    unexpected or misshapen.
    """
    folder = Path(folder)
    path = folder / CONFIG
    content = _read_json(path)
    network = _network_class(path, content)
    state = _read_weights(folder)
    config_class = typing.get_type_hints(network.__init__)["config"]
    try:
        config = from_dict(config_class, {key: value for key, value in content.items() if not key.startswith("_")})
        with torch.device("meta"), _Unfilled():
            module = network(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ArithmeticError, LookupError, RuntimeError) as error:       # sizes that no network can have
        raise CheckpointError(f"{path}: its values build no {network.__name__} ({_one_line(error)}); "
                              "take the config that belongs to the weights") from error
    integers = [key for key, tensor in state.items() if not tensor.is_floating_point()]
    if integers:
        raise CheckpointError(f"{folder}: {', '.join(integers[:3])} hold {state[integers[0]].dtype} values; "
                              "weights are floating-point numbers")
    spoilt = [key for key, tensor in state.items() if not tensor.sum(dtype=torch.float32).isfinite()]
    if spoilt:
        raise CheckpointError(f"{folder}: {', '.join(spoilt[:3])} hold NaN or infinity; their training diverged or the "
                              "file was spoilt: take another one")
    load_state(module, state, str(folder))
    if hasattr(module, "open_graph"):       # a network on another runtime: the rest of it is a graph in the same folder
        module.open_graph(folder, dtype)
        dtype = None
    return module.to(device=device, dtype=dtype).eval()


class _Unfilled(TorchFunctionMode):
    """Constructors compute no initial weights: on the meta device there are none, and torch would import its whole
    compiler to find that out, which takes longer than the decode of a small picture."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.normalize or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _network_class(path: Path, content: Mapping[str, Any]) -> Any:
    """The class a config names, looked up by name only: no module path of a stranger's file is imported."""
    registries = {name: registry for registry in (TOKENIZERS, MODELS, CONTROL_MODULES) for name in registry.names()}
    name = content.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: has no \"_class_name\"; known: {', '.join(sorted(registries))}")
    if name not in registries:
        raise CheckpointError(f"{path}: {UnknownNameError('class', name, registries)}")
    return registries[name].load(name)


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give `module` the tensors of `state`, strictly. They replace its own: a module on the meta device becomes real.

    Raises CheckpointError that starts with `where` and names the missing, unexpected and misshapen keys.
    """
    check_keys(module.state_dict(), state, f"{where}: keys do not fit {type(module).__name__}",
               "the weights and the config belong to different models")
    module.load_state_dict(dict(state), assign=True)
    unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if unset:
        raise CheckpointError(f"{where}: {type(module).__name__} keeps tensors outside its state dict "
                              f"({', '.join(unset)}); a network computes such tensors at run time")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return read_safetensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise CheckpointError(f"{folder}: has no weights; expected {WEIGHTS}")


def _read_shards(path: Path) -> dict[str, Tensor]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: has no \"weight_map\" of keys and shard names")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: shard {shard!r} lies outside the folder; shards lie beside the index")
        state.update(read_safetensors(path.parent / shard))
    return state


@contextmanager
def staged_folder(out: Path, marker: str) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name when the block ends well, and vanishes when it does not.

    An existing `out` is replaced only if it is empty or holds the file `marker`. Raises CheckpointError otherwise, and
    when the disk refuses.
    """
    out = out.absolute()
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and holds no {marker}, so it is not replaced; give another name")
    stage = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        stage.chmod(0o755)
        yield stage
        _take_place(stage, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error}); "
                              "check the path, its permissions and the free space") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _take_place(stage: Path, out: Path) -> None:
    """Rename `stage` to `out`; an older `out` steps aside first, and comes back if the renaming fails."""
    old = stage.with_name(f"{stage.name}.old")
    if out.exists():
        out.rename(old)
    try:
        stage.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the folder is not complete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object with keys")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
