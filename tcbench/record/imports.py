"""The arrows between the package's modules: which module imports which, read from the source without running it."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tcbench.outside.places import PACKAGE

_NAMED = re.compile(r"""["'](tcbench(?:\.\w+)+)(?::\w+)?["']""")


def imported_names(path: Path, run_time_only: bool = False) -> set[str]:
    """What a file imports, inside functions too; `from a import b` gives a.b as well, because b may be a module.

    Args:
        path: a Python file.
        run_time_only: leave out what stands under `if TYPE_CHECKING:`.

    Raises:
        ValueError: a relative import, which would hide the arrow.
    """
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body, run_time_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: line {node.lineno}: a relative import; name the package")
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _statements(body: Iterable[ast.stmt], run_time_only: bool) -> Iterator[ast.stmt]:
    """All statements, nested ones too; expressions hold no import, and walking them takes most of the time."""
    for node in body:
        yield node
        checked_only = run_time_only and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for field in ("orelse",) if checked_only else ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, field, ()), run_time_only)


def modules_loaded(path: Path) -> set[str]:
    """The package's modules that a file may load when it runs, the packages around them included.

    A module that is imported by its name (`import_module`) counts where the file has that name as a string, alone or
    as "module:attribute".
    """
    names = imported_names(path, run_time_only=True) | set(_NAMED.findall(path.read_text(encoding="utf-8")))
    return {name for name in with_packages(names) if module_file(name)}


def with_packages(names: Iterable[str]) -> set[str]:
    """Dotted names and those of what is around them: importing a module runs the packages that it lies in."""
    return {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}


@cache
def module_file(module: str) -> Path | None:
    """The file of a module of the package; None if there is no such module."""
    first, *rest = module.split(".")
    if first != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*rest)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def closure(modules: Iterable[str], without: frozenset[str]) -> set[str]:
    """`modules` and all that they load, directly or through others; those `without` are neither named nor followed."""
    found: set[str] = set()
    waiting = set(modules) - without
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= _loaded_by(module) - without - found
    return found


@cache
def _loaded_by(module: str) -> frozenset[str]:
    path = module_file(module)
    assert path is not None, f"no module {module}"
    return frozenset(modules_loaded(path))
