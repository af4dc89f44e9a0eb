"""Methods are found by file: `methods/fora.py` defines one `Method` named "fora", and that is all it takes."""

import importlib.util
import sys
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.places import method_file, method_files


def method_names() -> list[str]:
    """All methods, by file name."""
    return sorted(method_files())


@lru_cache
def method_class(name: str) -> type[Method]:
    """Load a method's class from its file.

    Raises:
        UserError: the file does not define exactly one `Method` whose `name` is the file's.
    """
    path = method_file(name)
    module_name = f"tcbench_methods.{name}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that its classes can be pickled and their annotations resolved
    spec.loader.exec_module(module)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module_name
    ]
    if len(found) != 1 or found[0].name != name:
        raise UserError(f"{path}: must define exactly one Method with name = {name!r}; found {len(found)}")
    return found[0]


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A method with its options.

    Raises:
        UserError: unknown method, or an option that is unknown, of the wrong type or impossible; one line each.
    """
    try:
        return method_class(name)(**options)
    except ValidationError as error:
        raise UserError("; ".join(_explain(name, problem, method_class(name)) for problem in error.errors())) from error


def _explain(name: str, problem: Any, cls: type[Method]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"methods/{name}.py: unknown option {field!r}; options: {', '.join(cls.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"methods/{name}.py: {field + ': ' if field else ''}{message}"
