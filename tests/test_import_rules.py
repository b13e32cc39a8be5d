"""The direction of imports and the things that no module may do, read from the syntax trees of the package.

The program at the end imports every module on its own: it finds circular imports that an import order hides.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arimg import registry
from arimg.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "arimg").rglob("*.py"))

# A module may import those of lower rank, and those of its own group. Groups of one rank do not import one another.
LAYERS: tuple[tuple[frozenset[str], ...], ...] = (
    (frozenset({"errors", "registry", "config", "presets", "home", "kernels"}),),
    (frozenset({"noise", "images", "devices", "weights", "data", "threads", "memory", "inference", "quantize"}),),
    (frozenset({"features"}),),
    (frozenset({"models"}), frozenset({"tokenizers"}), frozenset({"control"})),
    (frozenset({"checkpoints", "interop"}), frozenset({"accel"}), frozenset({"backends"})),
    (frozenset({"pipeline", "hub", "call", "conditions", "fit", "trace", "export"}),),
    (frozenset({"evals"}),),
    (frozenset({"train"}),),
    (frozenset({"bench"}),),
    (frozenset({"cli", "commands", "__main__"}),),
)
WITHOUT_TORCH = ("errors", "registry", "config", "presets", "cli")
# Optional or slow to import: inside functions only, but for the files named here.
LAZY = {"cv2": (), "timm": (), "transformers": (), "diffusers": ("hub.py", "train/loop.py"),
        "h5py": (), "onnx": (), "onnxruntime": (), "openvino": (), "resvg_py": (), "xformers": ()}
RANDOM = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal",
          "rand_like", "randn_like", "randint_like"}
GLOBAL_SWITCHES = {"set_default_dtype", "set_default_device", "set_default_tensor_type",
                   "set_float32_matmul_precision", "use_deterministic_algorithms"}
SEEDING = "manual_seed"
MAY_SEED = ("train",)       # dropout takes no generator


def module_name(path: Path) -> str:
    """arimg/control/base.py -> arimg.control.base"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_name(path) for path in FILES if path.stem != "__main__"]


def part_of(module: str) -> str | None:
    """arimg.control.base -> control; arimg.train.__main__ -> __main__ (a program); None for the package itself."""
    names = module.split(".")
    return None if len(names) == 1 else names[-1] if names[-1] == "__main__" else names[1]


def position(part: str) -> tuple[int, int]:
    """(rank, group) of a part of the package."""
    for rank, groups in enumerate(LAYERS):
        for index, group in enumerate(groups):
            if part in group:
                return rank, index
    raise AssertionError(f"arimg.{part} has no place in the direction of imports: give it one in LAYERS")


def may_import(importer: str, imported: str) -> bool:
    """Whether part `importer` may import part `imported`."""
    (rank, group), (other_rank, other_group) = position(importer), position(imported)
    return other_rank < rank or (other_rank, other_group) == (rank, group)


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import below `tree`; `from arimg import noise` counts as arimg.noise."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            base = node.module or ""
            if base == "arimg":
                yield from ((node.lineno, f"arimg.{alias.name}") for alias in node.names if alias.name[0] != "_")
            else:
                yield node.lineno, base


def module_level(tree: ast.Module) -> ast.Module:
    """`tree` without function bodies and `if TYPE_CHECKING:` blocks: what runs at import."""
    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that no module of the package may do, seeding the global generator included."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False:
            if node.arg in ("strict", "weights_only"):
                yield line, f"{node.arg}=False"
        elif isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if caught in ("everything", "Exception") or (caught == "BaseException" and not passes_on):
                yield line, f"catches {caught}"
        elif isinstance(node, ast.Attribute):
            yield from ((line, what) for what in _forbidden_attribute(node))
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if ast.unparse(target).startswith("torch.backends."):
                    yield line, f"sets {ast.unparse(target)}"
        elif isinstance(node, ast.Call) and not any(word.arg == "generator" for word in node.keywords):
            if _is_global_random(ast.unparse(node.func)):
                yield line, f"{ast.unparse(node.func)} without a generator"


def _forbidden_attribute(node: ast.Attribute) -> Iterator[str]:
    name = ast.unparse(node)
    if name == "sys.path":
        yield "touches sys.path"
    own = name.startswith("torch.Generator(")      # a generator of its own is what the rule asks for
    if name.startswith("torch.") and not own and node.attr in GLOBAL_SWITCHES | {SEEDING}:
        yield f"global torch switch {name}"
    if node.attr == "__class__" and isinstance(node.ctx, ast.Store):
        yield "assigns __class__"


def _is_global_random(function: str) -> bool:
    owner, _, name = function.rpartition(".")
    return ((owner == "torch" and name in RANDOM)
            or owner == "random" and name not in ("Random", "SystemRandom")
            or owner in ("np.random", "numpy.random") and name not in ("default_rng", "Generator"))


def trees(*parts: str) -> list[tuple[Path, ast.Module]]:
    """All files with their syntax trees, or those of some parts of the package."""
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in FILES
            if not parts or part_of(module_name(path)) in parts]


def report(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def test_the_package_was_found() -> None:
    assert {"errors", "registry", "noise"} <= {part_of(module_name(path)) for path in FILES}


def test_imports_go_one_way() -> None:
    wrong = []
    for path, tree in trees():
        part = part_of(module_name(path))
        for line, imported in imported_modules(tree):
            if part is None or not imported.startswith("arimg."):
                continue
            if not may_import(part, str(part_of(imported))):
                wrong.append(report(path, line, f"{part} imports {imported}"))
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_place() -> None:
    for path in FILES:
        part = part_of(module_name(path))
        assert part is None or position(part) >= (0, 0)


@pytest.mark.parametrize(("importer", "imported", "allowed"), [
    ("models", "tokenizers", False), ("control", "models", False), ("tokenizers", "control", False),
    ("accel", "models", True), ("accel", "interop", False), ("checkpoints", "interop", True),
    ("noise", "models", False), ("cli", "train", True), ("train", "cli", False), ("hub", "pipeline", True),
])
def test_the_direction_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_accel_knows_contracts_only() -> None:
    """A decoder meets a network and a codebook through their contracts (and shares numeric helpers of the layers)."""
    allowed = {"arimg.models.base", "arimg.models.layers", "arimg.tokenizers.base"}
    wrong = [report(path, line, imported) for path, tree in trees("accel") for line, imported in imported_modules(tree)
             if imported.startswith(("arimg.models", "arimg.tokenizers")) and imported not in allowed]
    assert not wrong, "\n".join(wrong)


def test_decode_paths_do_not_ask_for_training_mode() -> None:
    wrong = [report(path, node.lineno, ast.unparse(node)) for path, tree in trees("accel", "pipeline")
             for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "training"]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for path, tree in trees():
        inside = path.relative_to(ROOT / "arimg").as_posix()
        for line, imported in imported_modules(module_level(tree)):
            package = imported.split(".")[0]
            if package in LAZY and inside not in LAZY[package]:
                wrong.append(report(path, line, f"imports {package} at module level"))
            if package in ("torch", "torchvision") and part_of(module_name(path)) in WITHOUT_TORCH:
                wrong.append(report(path, line, f"imports {package}"))
    assert not wrong, "\n".join(wrong)


def test_nothing_forbidden() -> None:
    wrong = [report(path, line, what) for path, tree in trees() for line, what in forbidden(tree)
             if not (what.endswith(SEEDING) and part_of(module_name(path)) in MAY_SEED)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "m.load_state_dict(sd, strict=False)", "torch.load(f, weights_only=False)", "try:\n  f()\nexcept:\n  pass",
    "try:\n  f()\nexcept Exception:\n  pass", "try:\n  f()\nexcept BaseException:\n  pass", "sys.path.append('x')",
    "torch.set_default_dtype(x)", "torch.backends.cudnn.benchmark = True", "pipe.__class__ = Other",
    "torch.manual_seed(0)", "torch.rand(3)", "random.randint(0, 3)", "np.random.seed(0)",
])
def test_the_check_sees(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("source", [
    "m.load_state_dict(sd, strict=True)", "zip(a, b, strict=True)",
    "try:\n  f()\nexcept (OSError, KeyError):\n  pass",
    "try:\n  f()\nexcept BaseException:\n  clean()\n  raise", "torch.rand(3, generator=g)", "x = pipe.__class__",
    "np.random.default_rng(0)", "random.Random(3)", "torch.backends.mps.is_available()",
])
def test_the_check_lets_pass(source: str) -> None:
    assert not list(forbidden(ast.parse(source)))


def test_defect_06_every_option_of_a_config_is_read() -> None:
    """The originals' trainers took weight decay, gradient accumulation and loss weights, and used none of them."""
    nodes = [node for _, tree in trees() for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    configs = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert {"VQConfig", "ARConfig", "EncoderConfig", "ImageLossConfig"} <= {node.name for node in configs}
    unread = [f"{node.name}.{field.target.id}" for node in configs for field in node.body
              if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
              and field.target.id not in read]
    assert not unread, ", ".join(unread)


@pytest.mark.parametrize("table", [value for value in vars(registry).values() if isinstance(value, Registry)],
                         ids=lambda table: table.kind)
def test_defect_20_every_registered_name_leads_somewhere(table: Registry) -> None:
    """ControlAR's demo imported modules that are not in its repository."""
    for name in table.entries:
        assert callable(table.load(name))


def run(code: str, *arguments: str) -> str:
    """stdout of `python -c code` in the repository."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_modules_do_not_reach_torch() -> None:
    names = [f"arimg.{part}" for part in WITHOUT_TORCH]
    run(f"import sys, {', '.join(names)}\n"
        "heavy = {'torch', 'numpy', 'PIL', 'cv2', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy")


ALONE = """
import importlib, json, sys, traceback
import torch
failures = {}
for name in json.loads(sys.argv[1]):
    for known in [known for known in sys.modules if known.split(".")[0] == "arimg"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except BaseException:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


@pytest.fixture(scope="module")
def import_failures() -> dict[str, str]:
    """Tracebacks of the modules that do not import with no other module of the package loaded before."""
    return json.loads(run(ALONE, json.dumps(MODULES)))


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_alone(name: str, import_failures: dict[str, str]) -> None:
    assert name not in import_failures, import_failures[name]
