"""Our networks and pipeline as diffusers classes: `from_pretrained`, `save_pretrained`, offloading, `push_to_hub`.

Thin shells: same names, same state-dict keys, same folders as arimg.Pipeline. Importing this module imports diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from arimg.checkpoints import SECOND, PipelineSettings, find_model, load_component, read_index, save_component
from arimg.config import from_dict, to_dict
from arimg.control import adapter
from arimg.models import ar, causal, generators, mar, students, var, var_students
from arimg.models.text import TextEncoder
from arimg.pipeline import Pipeline
from arimg.tokenizers import kl, multiscale, vq


class _Config(dict[str, Any]):
    """The constructor's keywords as diffusers reads them, with the attributes and properties of the dataclass."""

    def __init__(self, plain: Any) -> None:
        super().__init__(to_dict(plain))
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):        # while a copy is being built there is no `_plain` yet
            raise AttributeError(name)
        return getattr(self._plain, name)


class _Shell(ModelMixin, ConfigMixin):
    """`.config` reads as diffusers' dictionary (`config["dim"]`) and as the network's dataclass (`config.dim`)."""

    config_name = "config.json"

    @property
    def config(self) -> Any:
        """The constructor's keywords."""
        return self._config

    @config.setter
    def config(self, plain: Any) -> None:
        self._config = _Config(plain)

    def __getattr__(self, name: str) -> Any:
        """Sub-modules come before config entries of the same name (`layers`), unlike in ModelMixin."""
        return nn.Module.__getattr__(self, name)


def _flat_init(network: type[nn.Module], config_class: Any) -> Callable[..., None]:
    """A constructor that takes the fields of `config_class` as keywords, which diffusers reads off its signature."""
    def __init__(self: Any, **fields: Any) -> None:
        network.__init__(self, from_dict(config_class, fields))

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                   for name, default in to_dict(config_class()).items()]
    __init__.__signature__ = inspect.Signature(parameters)                      # type: ignore[attr-defined]
    registered: Callable[..., None] = register_to_config(__init__)
    return registered


class VQTokenizer(vq.VQTokenizer, _Shell):
    """arimg.tokenizers.vq.VQTokenizer; keywords are the fields of VQConfig."""

    __init__ = _flat_init(vq.VQTokenizer, vq.VQConfig)


class MultiscaleTokenizer(multiscale.MultiscaleTokenizer, _Shell):
    """arimg.tokenizers.multiscale.MultiscaleTokenizer; keywords are the fields of MultiscaleConfig."""

    __init__ = _flat_init(multiscale.MultiscaleTokenizer, multiscale.MultiscaleConfig)


class KLTokenizer(kl.KLTokenizer, _Shell):
    """arimg.tokenizers.kl.KLTokenizer; keywords are the fields of KLConfig."""

    __init__ = _flat_init(kl.KLTokenizer, kl.KLConfig)


class ARTransformer(ar.ARTransformer, _Shell):
    """arimg.models.ar.ARTransformer; keywords are the fields of ARConfig."""

    __init__ = _flat_init(ar.ARTransformer, ar.ARConfig)


class VARTransformer(var.VARTransformer, _Shell):
    """arimg.models.var.VARTransformer; keywords are the fields of VARConfig."""

    __init__ = _flat_init(var.VARTransformer, var.VARConfig)


class MARTransformer(mar.MARTransformer, _Shell):
    """arimg.models.mar.MARTransformer; keywords are the fields of MARConfig."""

    __init__ = _flat_init(mar.MARTransformer, mar.MARConfig)


class CausalTransformer(causal.CausalTransformer, _Shell):
    """arimg.models.causal.CausalTransformer; keywords are the fields of CausalConfig."""

    __init__ = _flat_init(causal.CausalTransformer, causal.CausalConfig)


class ARStudent(students.ARStudent, _Shell):
    """arimg.models.students.ARStudent; keywords are the fields of ARStudentConfig."""

    __init__ = _flat_init(students.ARStudent, students.ARStudentConfig)


class VARStudent(var_students.VARStudent, _Shell):
    """arimg.models.var_students.VARStudent; keywords are the fields of VARStudentConfig."""

    __init__ = _flat_init(var_students.VARStudent, var_students.VARStudentConfig)


class ARGenerator(generators.ARGenerator, _Shell):
    """arimg.models.generators.ARGenerator; keywords are the fields of ARGeneratorConfig."""

    __init__ = _flat_init(generators.ARGenerator, generators.ARGeneratorConfig)


class VARGenerator(generators.VARGenerator, _Shell):
    """arimg.models.generators.VARGenerator; keywords are the fields of VARGeneratorConfig."""

    __init__ = _flat_init(generators.VARGenerator, generators.VARGeneratorConfig)


class ControlAdapter(adapter.ControlAdapter, _Shell):
    """arimg.control.adapter.ControlAdapter; keywords are the fields of ControlConfig."""

    __init__ = _flat_init(adapter.ControlAdapter, adapter.ControlConfig)


class ArimgPipeline(DiffusionPipeline):
    """The pipeline as a DiffusionPipeline: `ArimgPipeline.from_pretrained(name)(control=image, guidance_scale=3.0)`.

    Its folders and those of arimg.Pipeline are the same. Load it with this class: DiffusionPipeline.from_pretrained
    looks for class names in diffusers only.
    """

    _optional_components = ["control", "text_encoder", "text_tokenizer"]
    model_cpu_offload_seq = "text_encoder->control->transformer->tokenizer"

    def __init__(self, tokenizer: nn.Module, transformer: nn.Module, control: nn.Module | None = None,
                 text_encoder: Any = None, text_tokenizer: Any = None,
                 settings: Mapping[str, Any] | None = None, decoders: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.decoders = dict(decoders or {})
        self.register_modules(tokenizer=tokenizer, transformer=transformer, control=control, text_encoder=text_encoder,
                              text_tokenizer=text_tokenizer)
        classes = {name: ["arimg.hub", type(network).__name__] for name, network in self.decoders.items()}
        self.register_to_config(settings=dict(settings or to_dict(PipelineSettings())),
                                **({"decoders": classes} if classes else {}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, revision: str | None = None,
                        local_files_only: bool = False, **kwargs: Any) -> "ArimgPipeline":
        """Load an embedded model, a folder or a hub id; `kwargs` go to diffusers (`dtype`, `device_map`, components).

        Raises CheckpointError or UnknownNameError, also on folders that want code from libraries we do not trust.
        """
        folder = find_model(pretrained_model_name_or_path, revision, local_files_only)
        names = read_index(folder).second_networks
        kwargs.pop("custom_pipeline", None)                 # would run the folder's own code
        networks = {name: load_component(folder / SECOND / name) for name in names}
        loaded: ArimgPipeline = super().from_pretrained(str(folder), **{"decoders": networks, **kwargs})
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers does, and the networks of single decoders."""
        super().save_pretrained(save_directory, **kwargs)
        for name, network in self.decoders.items():
            save_component(network, Path(save_directory) / SECOND / name)

    def __call__(self, control: Any = None, callback_on_step_end: Callable[..., Any] | None = None,
                 **options: Any) -> Any:
        """Paint pictures; see arimg.pipeline.Pipeline.__call__ and arimg.call.CallOptions for the keywords.

        The diffusers names work too: guidance_scale, controlnet_conditioning_scale, control_guidance_start,
        control_guidance_end, class_labels, generator, num_images_per_prompt, height, width, output_type, return_dict.
        """
        def callback(_: Pipeline, *arguments: Any) -> Any:
            assert callback_on_step_end is not None
            return callback_on_step_end(self, *arguments)
        return self.plain()(control, callback_on_step_end=callback_on_step_end and callback, **options)

    def plain(self) -> Pipeline:
        """The same networks as an arimg.Pipeline."""
        text = None if self.text_encoder is None else TextEncoder(self.text_encoder, self.text_tokenizer)
        decoders = {name: network.to(self.transformer.device, self.transformer.dtype)
                    for name, network in self.decoders.items()}
        return Pipeline(self.tokenizer, self.transformer, self.control, text,
                        from_dict(PipelineSettings, self.config.settings), decoders)
