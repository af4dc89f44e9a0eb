"""Methods and data sets are found by file, and that is all it takes.

`methods/fora.py` defines one `Method` named "fora", `tcbench/data/sets/digits.py` one `DataSource` named "digits".
"""

import importlib.util
import marshal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from tcbench.data.source import DataSource
from tcbench.errors import UserError
from tcbench.method import Decides, Method
from tcbench.outside.places import PACKAGE, data_file, data_files, method_file, method_files
from tcbench.plan import described
from tcbench.watch.guard import blamed


def method_names() -> list[str]:
    """All methods, by file name."""
    return sorted(method_files())


@lru_cache
def method_class(name: str) -> type[Method]:
    """Load a method's class from its file.

    Raises:
        UserError: the file cannot be run, does not define exactly one `Method` whose `name` is the file's, or says
            something else of it than a method can be.
    """
    path = method_file(name)
    cls = _class_in(path, Method, "tcbench_methods")
    described = {
        "label = a text": isinstance(getattr(cls, "label", None), str),
        "knob = one of its options, or None": cls.knob is None or cls.knob in cls.model_fields,
        f"decides = one of {', '.join(get_args(Decides))}": cls.decides in get_args(Decides),
        "trains = True or False": isinstance(cls.trains, bool),
        "predicts = True or False": isinstance(cls.predicts, bool),
    }
    if wrong := [what for what, right in described.items() if not right]:
        raise UserError(f"{path}: set {wrong[0]}")
    return cls


def documentation(cls: type[Method]) -> str:
    """What the docstring of a method's class says, and below it those of the bases whose options it inherits."""
    classes = [base for base in cls.__mro__ if issubclass(base, Method) and base is not Method]
    return "\n\n    ".join((base.__doc__ or "").rstrip() for base in classes)


def data_names() -> list[str]:
    """All data sets, by file name."""
    return sorted(data_files())


def data_source(name: str, folder: Path | None = None) -> DataSource:
    """A data set, with the folder that its files are in, if a suite names it.

    Raises:
        UserError: there is no such data set, or its file does not define exactly one `DataSource` of the file's name.
    """
    return _source_class(data_file(name).resolve())(folder)


@lru_cache
def _source_class(path: Path) -> type[DataSource]:
    packaged = path.parent == PACKAGE / "data" / "sets"
    return _class_in(path, DataSource, "tcbench.data.sets" if packaged else "tcbench_data_sets")


def _class_in(path: Path, kind: type, package: str) -> Any:
    """The one class of a kind that a file defines; its `name` is the file's."""
    module_name = f"{package}.{path.stem}"
    if package.startswith("tcbench."):
        module = importlib.import_module(module_name)
    else:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # so that its classes can be pickled and their annotations resolved
        try:
            with blamed(str(path), file=module.__file__):
                spec.loader.exec_module(module)
        except UserError:
            del sys.modules[module_name]
            raise
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == module_name
    ]
    what = kind.__name__
    if len(found) != 1:
        raise UserError(f"{path}: must define exactly one {what} with name = {path.stem!r}; found {len(found)}")
    if (said := getattr(found[0], "name", None)) != path.stem:
        has = f"has name = {described(said)}" if said is not None else "has no name"
        raise UserError(f"{path}: its {what} {has}; set name = {path.stem!r}, or rename the file")
    return found[0]


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A method with its options; the same one for the same options, because no method changes.

    Raises:
        UserError: unknown method, or an option that is unknown, of the wrong type or impossible; one line each.
    """
    cls = method_class(name)
    try:
        written = marshal.dumps(options)
    except ValueError:  # a value of another type than a config has; its method may refuse it
        return _made(cls, options)
    if (cls, written) not in _METHODS:
        _METHODS[cls, written] = _made(cls, options)
    return _METHODS[cls, written]


_METHODS: dict[tuple[type[Method], bytes], Method] = {}
"""By class and options: a workflow asks for those of a suite's rows thousands of times."""


def _made(cls: type[Method], options: dict[str, Any]) -> Method:
    name = cls.name
    with blamed(f"methods/{name}.py", "options", sys.modules[cls.__module__].__file__):
        try:
            return cls(**options)
        except ValidationError as error:
            raise UserError("; ".join(_explain(name, problem, cls) for problem in error.errors())) from error


def _explain(name: str, problem: Any, cls: type[Method]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"methods/{name}.py: unknown option {field!r}; options: {', '.join(cls.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":  # pydantic's own words do not say what was given
        message += f", not {described(problem['input'])}"
    return f"methods/{name}.py: {field + ': ' if field else ''}{message}"
