"""The arrows between modules: who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

from tcbench.record.imports import imported_names
from tcbench.registry import method_names

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tcbench"

FOR_METHODS = (
    *("plan", "choose", "schedule", "extrapolate", "bipartite", "selector", "partial", "routed", "method", "trainable"),
)
"""The vocabulary: what a method's file is written in."""
CORE = {f"tcbench.{name}" for name in (*FOR_METHODS, "shapes", "guidance", "ledger", "engine", "tensors", "watch")}
VOCABULARY = {f"tcbench.{name}" for name in (*FOR_METHODS, "tensors.unseen", "errors")}
ABOVE_THE_ENGINE = {
    "tcbench.artefacts",
    "tcbench.attach",
    "tcbench.audit",
    "tcbench.batches",
    "tcbench.config",
    "tcbench.budget",
    "tcbench.golden",
    "tcbench.metrics",
    "tcbench.registry",
    "tcbench.replay",
    "tcbench.report",
    "tcbench.samplers",
    "tcbench.sampling",
    "tcbench.stages",
    "tcbench.training",
}


def touched(imported: set[str], modules: set[str]) -> set[str]:
    """The `modules` that are imported, themselves or a part of them."""
    return {module for module in modules for name in imported if f"{name}.".startswith(f"{module}.")}


def tcbench_modules(imported: set[str]) -> set[str]:
    """The rooms that are imported: modules at the top of the package, and folders."""
    return {".".join(name.split(".")[:2]) for name in imported if name.startswith("tcbench")} - {"tcbench"}


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).glob("**/*.py"))
    assert found
    return found


@pytest.mark.parametrize("name", method_names())
def test_methods_import_the_vocabulary_only(name: str) -> None:
    imported = imported_names(ROOT / "methods" / f"{name}.py")
    assert not {name for name in imported if name.startswith("tcbench.") and not touched({name}, VOCABULARY)}
    outside = {module.split(".")[0] for module in imported} - {"tcbench"}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "numpy", "pydantic"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("tensors/unseen", set()),
        ("tensors/draws", set()),
        ("tensors/groups", set()),
        ("outside/foreign", {"errors"}),
        ("guidance", set()),
        ("outside/devices", {"errors"}),
        ("outside/places", {"errors"}),
        ("timesteps", {"errors"}),
        ("stats", {"errors"}),
        ("record/executed", set()),
        ("record/score", set()),
        ("record/files", {"errors"}),
        ("record/identity", {"errors", "record"}),
        ("record/imports", {"outside"}),
        ("record/records", {"errors", "record"}),
        ("record/shards", {"errors", "record"}),
        ("record/sources", {"outside", "record"}),
        ("record/spent", {"record"}),
        ("record/videos", set()),
        ("plan/__init__", {"plan"}),
        ("plan/refusal", {"tensors"}),
        ("plan/where", {"plan"}),
        ("plan/who", {"plan", "tensors"}),
        ("plan/fill", {"plan", "tensors"}),
        ("plan/decisions", {"plan", "record"}),
        ("watch/checking", {"plan", "tensors"}),
        ("watch/surroundings", {"errors"}),
        ("watch/guard", {"errors", "plan", "trainable", "watch"}),
        ("watch/undisturbed", {"errors", "watch"}),
        ("choose", {"kernels", "plan", "tensors", "watch"}),
        ("shapes", {"plan"}),
        ("trainable", set()),
        ("method", {"errors", "guidance", "plan", "shapes", "tensors", "trainable", "watch"}),
        ("schedule", {"errors", "method", "plan"}),
        ("extrapolate", set()),
        ("bipartite", {"errors", "method", "shapes", "tensors"}),
        ("selector", {"choose", "method", "plan", "schedule"}),
        ("partial", {"choose", "errors", "method", "plan", "tensors"}),
        ("routed", {"method", "plan", "schedule", "trainable"}),
        ("ledger", {"plan", "shapes"}),
        ("observations", {"errors", "ledger", "method", "shapes", "tensors"}),
        ("precision", set()),
        ("aside", set()),
        ("models/specs", {"guidance", "precision", "shapes"}),
        ("models/inferred", {"errors", "models"}),
        ("models/adapter", {"models", "shapes", "tensors"}),
        ("models/layers", set()),
        ("models/dit", {"errors", "models"}),
        ("models/text_adapter", {"errors", "models"}),
        ("models/pixart", {"errors", "models"}),
        ("models/open_sora_plan", {"models", "tensors"}),
        ("models/flux", {"models"}),
        ("models/wan", {"errors", "models"}),
        ("models/weights", {"errors", "models", "outside"}),
        ("models/networks", {"errors", "models", "outside", "record"}),
        ("models/predictor", {"kernels", "ledger", "models"}),
        ("engine/cache", {"plan"}),
        ("engine/blocks", {"plan", "record"}),
        ("engine/merging", {"engine", "models", "plan"}),
        ("engine/plain", {"engine", "method", "models", "plan", "record"}),
        ("engine/ahead", {"method", "models"}),
        ("engine/compiled", {"engine", "errors", "method", "models", "record"}),
        ("engine/fused", {"engine", "kernels", "method", "models", "plan", "record"}),
        ("engine/fastest", {"engine", "models"}),
        ("engine/soft", {"models", "plan"}),
        (
            "engine/engine",
            {"engine", "ledger", "method", "models", "observations", "plan", "record", "shapes", "watch"},
        ),
        ("samplers", {"errors", "models", "tensors", "timesteps"}),
        (
            "sampling",
            {"engine", "errors", "ledger", "method", "models", "record", "samplers", "tensors", "watch"},
        ),
        ("attach/pipelines", {"errors", "guidance", "models"}),
        ("attach/summary", {"ledger", "method", "plan", "record"}),
        ("attach/served", {"engine", "errors", "models"}),
        ("attach/call", {"attach", "engine", "errors", "guidance", "method", "models", "sampling"}),
        (
            "attach/cached",
            {"artefacts", "attach", "errors", "guidance", "method", "models", "record", "registry", "shapes", "watch"},
        ),
        ("replay", {"engine", "method", "models", "record", "samplers", "sampling", "watch"}),
        (
            "batches",
            {"data", "engine", "errors", "method", "models", "record", "replay", "samplers", "sampling", "watch"},
        ),
        ("artefacts", {"errors", "method", "models", "plan", "record", "trainable"}),
        ("registry", {"data", "errors", "method", "outside", "plan", "watch"}),
        ("config/fields", {"errors", "metrics", "models", "precision", "registry"}),
        ("config/document", {"errors"}),
        ("config/depends", {"config"}),
        ("config/page", {"config"}),
        ("config/preview", {"config", "errors"}),
        ("config/suite", {"config", "data", "method", "models", "precision", "record", "registry"}),
        ("config/check", {"config", "data", "errors", "method", "metrics", "models", "precision", "registry"}),
        ("config/load", {"config", "errors", "outside"}),
        ("config/speed", {"config", "errors", "method", "models", "precision", "record", "registry"}),
        ("workflow", {"config", "console", "errors", "outside"}),
        (
            "budget/costing",
            {"artefacts", "ledger", "method", "models", "observations", "plan", "shapes", "timesteps", "trainable"}
            | {"tensors", "watch"},
        ),
        ("budget/borrowing", {"budget", "config", "errors", "method", "record", "registry", "trainable"}),
        ("budget/searching", {"schedule"}),
    ],
)
def test_the_core_points_one_way(module: str, allowed: set[str]) -> None:
    assert tcbench_modules(imported_names(PACKAGE / f"{module}.py")) <= {f"tcbench.{name}" for name in allowed}


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.stem)
def test_models_know_no_engine(path: Path) -> None:
    assert not touched(imported_names(path), ABOVE_THE_ENGINE | {"tcbench.engine.engine", "tcbench.engine.cache"})


def test_the_engine_names_no_method() -> None:
    engine = [f"engine/{path.stem}" for path in files("engine")]
    vocabulary = [name for name in FOR_METHODS if name != "plan"] + [f"plan/{path.stem}" for path in files("plan")]
    for module in (*vocabulary, "shapes", "guidance", "ledger", "tensors/draws", *engine):
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        words = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not (words | names) & set(method_names()), module


@pytest.mark.parametrize("path", files("metrics"), ids=lambda path: path.stem)
def test_metrics_know_no_method(path: Path) -> None:
    assert not touched(imported_names(path), CORE | (ABOVE_THE_ENGINE - {"tcbench.metrics"}))


@pytest.mark.parametrize("path", [*files("report"), PACKAGE / "stages" / "render.py"], ids=lambda path: path.stem)
def test_the_report_imports_no_torch(path: Path) -> None:
    forbidden = {"torch", "diffusers", "transformers", "safetensors.torch"} | CORE | {"tcbench.models"}
    light = ("tcbench.metrics.catalogue", "tcbench.metrics.inference")
    names = {name for name in imported_names(path) if not name.startswith(light)}
    assert not touched(names, forbidden | {"tcbench.sampling", "tcbench.training", "tcbench.metrics"})


LIGHT = [
    *("errors", "timesteps", "registry", "cli", "workflow", "listing", "completion", "starter", "console"),
    *("outside/__init__", "outside/devices", "outside/foreign", "outside/places", "outside/warm"),
    *("tensors/__init__", "tensors/unseen"),
    *(f"plan/{path.stem}" for path in files("plan")),
    *("choose", "schedule", "extrapolate", "bipartite", "selector", "partial", "routed", "shapes"),
    *("guidance", "method", "trainable"),
    *("ledger", "observations"),
    *("watch/__init__", "watch/checking", "watch/guard", "watch/surroundings"),
    *("precision", "aside"),
    *(f"config/{path.stem}" for path in files("config")),
    *(
        f"record/{name}"
        for name in (
            *("__init__", "executed", "files", "identity", "imports", "records", "rivals", "score", "shards"),
            *("sources", "spent", "videos", "yardstick"),
        )
    ),
    *("models/specs", "models/inferred", "budget/__init__", "budget/borrowing", "budget/costing", "budget/matching"),
    *("budget/searching", "budget/reaching"),
    *(f"data/sets/{path.stem}" for path in files("data/sets")),
    *("data/__init__", "data/source", "data/captions", "data/captioned", "data/images", "data/prompts"),
    "data/videos",
    *("metrics/__init__", "metrics/catalogue", "metrics/inference", "stats"),
    *("audit/__init__", "audit/cells", "audit/checks", "audit/columns", "audit/paper", "audit/sections", "audit/text"),
    *("report/audit", "report/table"),
    *(f"forecast/{path.stem}" for path in files("forecast") if path.stem != "calibrate"),
]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_torch_only_inside_functions(module: str) -> None:
    """What needs no tensor does without it; tests/test_quick.py looks at what commands really import."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    top = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
    light = {f"tcbench.{name.replace('/', '.').removesuffix('.__init__')}" for name in LIGHT}
    assert not touched(top, {"torch", "diffusers", "safetensors.torch"})
    assert {name for name in top if name.startswith("tcbench.")} <= light


@pytest.mark.parametrize("path", [ROOT / "Snakefile", *(PACKAGE / "rules").glob("*.smk")], ids=lambda path: path.name)
def test_the_workflow_imports_no_torch(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "import torch" not in text and "from torch" not in text
