"""Names to "package.module:Attribute" strings. Listing names imports nothing; `load` imports what it returns.

Other packages add entries through entry points of the group named in each registry (docs/extend.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from arimg.errors import UnknownNameError


@dataclass(frozen=True)
class Registry:
    """A table of one kind of part: its own entries, then those of installed entry points."""

    kind: str
    group: str
    entries: dict[str, str] = field(default_factory=dict)

    def specs(self) -> dict[str, str]:
        """All names with their "package.module:Attribute" strings; arimg's own names win over foreign ones."""
        foreign = {point.name: point.value for point in entry_points(group=self.group)}
        return {**foreign, **self.entries}

    def names(self) -> tuple[str, ...]:
        """All known names, sorted."""
        return tuple(sorted(self.specs()))

    def check(self, name: str) -> str:
        """Return `name` if it is known. Raises UnknownNameError with the nearest names otherwise."""
        if name not in self.entries and name not in self.specs():
            raise UnknownNameError(self.kind, name, self.names())
        return name

    def load(self, name: str) -> Any:
        """Import and return the object behind `name`. Raises UnknownNameError."""
        self.check(name)
        module, _, attribute = self.specs()[name].partition(":")
        return getattr(import_module(module), attribute)


TOKENIZERS = Registry("tokenizer", "arimg.tokenizers", {
    "VQTokenizer": "arimg.tokenizers.vq:VQTokenizer",
    "MultiscaleTokenizer": "arimg.tokenizers.multiscale:MultiscaleTokenizer",
    "KLTokenizer": "arimg.tokenizers.kl:KLTokenizer",
    "OnnxTokenizer": "arimg.backends.tokenizer:OnnxTokenizer",
    "OpenvinoTokenizer": "arimg.backends.tokenizer:OpenvinoTokenizer",
})
MODELS = Registry("model", "arimg.models", {
    "ARTransformer": "arimg.models.ar:ARTransformer",
    "VARTransformer": "arimg.models.var:VARTransformer",
    "MARTransformer": "arimg.models.mar:MARTransformer",
    "CausalTransformer": "arimg.models.causal:CausalTransformer",
    "ARStudent": "arimg.models.students:ARStudent",
    "VARStudent": "arimg.models.var_students:VARStudent",
    "ARGenerator": "arimg.models.generators:ARGenerator",
    "VARGenerator": "arimg.models.generators:VARGenerator",
    "OnnxTransformer": "arimg.backends.transformer:OnnxTransformer",
    "OpenvinoTransformer": "arimg.backends.transformer:OpenvinoTransformer",
})
CONTROL_MODULES = Registry("control module", "arimg.control_modules", {
    "ControlAdapter": "arimg.control.adapter:ControlAdapter",
})
CONTROLS = Registry("control type", "arimg.controls", {
    "canny": "arimg.control.canny:Canny",
    "hed": "arimg.control.hed:SoftEdge",
    "softedge": "arimg.control.softedge:SoftEdges",
    "lineart": "arimg.control.lineart:Lineart",
    "color": "arimg.control.color:ColorRegions",
    "depth": "arimg.control.depth:Depth",
    "seg": "arimg.control.seg:Segmentation",
    "map": "arimg.control.base:AsIs",
})
DECODERS = Registry("decoder", "arimg.decoders", {
    "ar": "arimg.accel.ar:PlainAR",
    "jacobi": "arimg.accel.jacobi:Jacobi",
    "sjd": "arimg.accel.jacobi:Sjd",
    "scd": "arimg.accel.jacobi:Scd",
    "scd-gumbel": "arimg.accel.jacobi:ScdGumbel",
    "scd-siblings": "arimg.accel.siblings:ScdSiblings",
    "gsd": "arimg.accel.jacobi:Gsd",
    "zipar": "arimg.accel.rows:ZipAR",
    "scale": "arimg.accel.scale:ScaleByScale",
    "scale-smooth": "arimg.accel.scale:SmoothScales",
    "masked": "arimg.accel.masked:Masked",
    "ar-continuous": "arimg.accel.masked:ArContinuous",
    "cspd": "arimg.accel.continuous:Cspd",
    "cspd-relaxed": "arimg.accel.relaxed:CspdRelaxed",
    "jacobi-continuous": "arimg.accel.continuous:JacobiContinuous",
    "dd1": "arimg.accel.dd1:Dd1",
    "dd2": "arimg.accel.dd2:Dd2",
})
OBJECTIVES = Registry("objective", "arimg.objectives", {
    "tokenizer": "arimg.train.tokenizer:TokenizerObjective",
    "ar": "arimg.train.ar:ARObjective",
    "control": "arimg.train.control:ControlObjective",
    "var": "arimg.train.var:VARObjective",
    "var-control": "arimg.train.var:VARControlObjective",
    "mar": "arimg.train.mar:MARObjective",
    "mar-control": "arimg.train.mar:MARControlObjective",
    "causal": "arimg.train.causal:CausalObjective",
    "causal-control": "arimg.train.causal:CausalControlObjective",
    "dd1": "arimg.train.dd1:DD1Objective",
    "dd2-tuning": "arimg.train.dd_scores:TuningObjective",
    "dd2": "arimg.train.dd2:DD2Objective",
})
EXTRACTORS = Registry("feature extractor", "arimg.extractors", {
    "inception": "arimg.evals.extractors:AdmInception",
    "effnet_lite0": "arimg.evals.extractors:EffnetLite0Pooled",
})
