"""The arrows between modules: who may import whom, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def imports(path: Path, run_time_only: bool = False) -> set[str]:
    """Modules a file imports; `from a import b` gives a.b too, because b may be a module."""
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), run_time_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the arrows"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def statements(tree: ast.AST, run_time_only: bool) -> Iterator[ast.AST]:
    """All nodes, or those outside `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if run_time_only and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from statements(node, run_time_only)


def touched(imported: set[str], modules: set[str]) -> set[str]:
    """The `modules` that are imported, themselves or a part of them."""
    return {module for module in modules for name in imported if f"{name}.".startswith(f"{module}.")}


def tcbench_modules(imported: set[str]) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in imported if name.startswith("tcbench")} - {"tcbench"}


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).glob("**/*.py"))
    assert found
    return found


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path) -> None:
    """Otherwise the rules below would hold for want of eyes."""
    path = tmp_path / "case.py"
    path.write_text(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    import g\n", encoding="utf-8"
    )
    assert imports(path) == {"a.b", "c", "c.d", "e", "g"}
    assert imports(path, run_time_only=True) == {"a.b", "c", "c.d", "g"}
    assert touched({"tcbench.engine.Engine"}, {"tcbench.engine", "tcbench.eng"}) == {"tcbench.engine"}


@pytest.mark.parametrize("name", method_names())
def test_methods_import_the_vocabulary_only(name: str) -> None:
    imported = imports(ROOT / "methods" / f"{name}.py")
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
        ("plan", {"errors", "kernels", "unseen"}),
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
        ("engine", {"cache", "ledger", "method", "models", "observations", "plan", "shapes"}),
        ("sampling", {"cache", "noise", "engine", "errors", "fused", "method", "models", "timesteps"}),
        ("replay", {"engine", "fused", "method", "models", "sampling"}),
        ("places", {"errors"}),
        ("sources", {"files", "places"}),
        ("registry", {"data", "errors", "method", "places"}),
        ("config", {"data", "errors", "files", "method", "metrics", "models", "places", "registry"}),
        ("speed_config", {"config", "errors", "files", "method", "models", "registry"}),
        ("workflow", {"config", "errors", "places", "speed_config"}),
        (
            "costing",
            {"ledger", "method", "models", "observations", "plan", "shapes", "timesteps", "training", "unseen"},
        ),
        ("borrowing", {"config", "costing", "errors"}),
    ],
)
def test_the_core_points_one_way(module: str, allowed: set[str]) -> None:
    assert tcbench_modules(imports(PACKAGE / f"{module}.py")) <= {f"tcbench.{name}" for name in allowed}


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.stem)
def test_models_know_no_engine(path: Path) -> None:
    assert not touched(imports(path), ABOVE_THE_ENGINE | {"tcbench.engine", "tcbench.cache"})


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
    assert not touched(imports(path), CORE | (ABOVE_THE_ENGINE - {"tcbench.metrics"}))


@pytest.mark.parametrize("path", [*files("report"), PACKAGE / "stages" / "render.py"], ids=lambda path: path.stem)
def test_the_report_imports_no_torch(path: Path) -> None:
    forbidden = {"torch", "diffusers", "transformers", "safetensors.torch"} | CORE | {"tcbench.models"}
    imported = {name for name in imports(path) if not name.startswith("tcbench.metrics.catalogue")}
    assert not touched(imported, forbidden | {"tcbench.sampling", "tcbench.training", "tcbench.metrics"})


LIGHT = [
    *("places", "workflow", "shapes", "guidance", "observations"),
    *("errors", "assets", "unseen", "timesteps", "plan", "method", "ledger", "models/specs", "costing", "matching"),
    *("registry", "config", "borrowing", "speed_config", "cli", "files", "sources", "needs"),
    *(f"data/sets/{path.stem}" for path in files("data/sets")),
    *("data/__init__", "data/source", "data/captions", "data/captioned", "data/images", "data/prompts"),
    "data/videos",
    *("metrics/__init__", "metrics/catalogue"),
    *("audit/__init__", "audit/cells", "audit/columns", "audit/paper", "audit/text", "report/audit", "report/render"),
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
