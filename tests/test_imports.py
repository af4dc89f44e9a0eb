"""The arrows between modules: who may import whom, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

from tcbench.imports import imported_names
from tcbench.registry import method_names

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tcbench"

CORE = {f"tcbench.{name}" for name in ("plan", "shapes", "guidance", "method", "ledger", "cache", "engine", "noise")}
ABOVE_THE_ENGINE = {
    "tcbench.audit",
    "tcbench.config",
    "tcbench.costing",
    "tcbench.matching",
    "tcbench.metrics",
    "tcbench.registry",
    "tcbench.replay",
    "tcbench.report",
    "tcbench.sampling",
    "tcbench.stages",
    "tcbench.training",
}


def touched(imported: set[str], modules: set[str]) -> set[str]:
    """The `modules` that are imported, themselves or a part of them."""
    return {module for module in modules for name in imported if f"{name}.".startswith(f"{module}.")}


def tcbench_modules(imported: set[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in imported if name.startswith("tcbench")} - {"tcbench"}


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).glob("**/*.py"))
    assert found
    return found


@pytest.mark.parametrize("name", method_names())
def test_methods_import_the_vocabulary_only(name: str) -> None:
    imported = imported_names(ROOT / "methods" / f"{name}.py")
    assert tcbench_modules(imported) <= {"tcbench.method", "tcbench.plan", "tcbench.unseen", "tcbench.errors"}
    outside = {module.split(".")[0] for module in imported} - {"tcbench"}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "numpy", "pydantic"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("assets", set()),
        ("unseen", set()),
        ("timesteps", {"errors"}),
        ("executed", set()),
        ("score", set()),
        ("plan", {"errors", "executed", "kernels", "unseen"}),
        ("files", {"errors"}),
        ("noise", set()),
        ("shapes", {"plan"}),
        ("guidance", set()),
        ("method", {"errors", "guidance", "plan", "shapes", "unseen"}),
        ("observations", {"errors", "ledger", "method", "noise", "shapes"}),
        ("ledger", {"plan", "shapes"}),
        ("cache", {"plan"}),
        ("stats", {"errors"}),
        ("groups", set()),
        ("models/specs", {"guidance", "shapes"}),
        ("models/adapter", {"groups", "models", "shapes"}),
        ("models/dit", {"errors", "models"}),
        ("models/pixart", {"errors", "models"}),
        ("models/open_sora_plan", {"groups", "models"}),
        ("models/networks", {"assets", "errors", "files", "models"}),
        ("models/predictor", {"kernels", "ledger", "models"}),
        ("fused", {"cache", "kernels", "method", "models", "plan"}),
        ("engine", {"cache", "executed", "ledger", "method", "models", "observations", "plan", "shapes"}),
        ("sampling", {"cache", "noise", "engine", "errors", "executed", "fused", "method", "models", "timesteps"}),
        ("replay", {"engine", "fused", "method", "models", "sampling"}),
        ("places", {"errors"}),
        ("imports", {"places"}),
        ("sources", {"files", "imports", "places"}),
        ("registry", {"data", "errors", "method", "places"}),
        ("entry", {"config", "files", "method", "registry"}),
        ("config", {"data", "entry", "errors", "files", "method", "metrics", "models", "places", "registry"}),
        ("speed_config", {"config", "errors", "files", "method", "models", "registry"}),
        ("workflow", {"config", "errors", "places", "speed_config"}),
        (
            "costing",
            {"ledger", "method", "models", "observations", "plan", "shapes", "timesteps", "training", "unseen"},
        ),
        ("borrowing", {"config", "costing", "entry", "errors"}),
    ],
)
def test_the_core_points_one_way(module: str, allowed: set[str]) -> None:
    assert tcbench_modules(imported_names(PACKAGE / f"{module}.py")) <= {f"tcbench.{name}" for name in allowed}


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.stem)
def test_models_know_no_engine(path: Path) -> None:
    assert not touched(imported_names(path), ABOVE_THE_ENGINE | {"tcbench.engine", "tcbench.cache"})


def test_the_engine_names_no_method() -> None:
    for module in ("plan", "shapes", "guidance", "method", "ledger", "cache", "engine", "fused", "noise"):
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
    names = {name for name in imported_names(path) if not name.startswith("tcbench.metrics.catalogue")}
    assert not touched(names, forbidden | {"tcbench.sampling", "tcbench.training", "tcbench.metrics"})


LIGHT = [
    *("places", "workflow", "shapes", "guidance", "observations", "executed"),
    *("errors", "assets", "unseen", "timesteps", "plan", "method", "ledger", "models/specs", "costing", "matching"),
    *("registry", "config", "entry", "borrowing", "speed_config", "cli", "files", "imports", "sources", "needs"),
    *(f"data/sets/{path.stem}" for path in files("data/sets")),
    *("data/__init__", "data/source", "data/captions", "data/captioned", "data/images", "data/prompts"),
    "data/videos",
    *("metrics/__init__", "metrics/catalogue"),
    *("audit/__init__", "audit/cells", "audit/checks", "audit/columns", "audit/paper", "audit/sections", "audit/text"),
    *("report/audit", "report/table"),
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
