"""Reading configs: every problem is one line that names file, field and fix, and all of them are found in one run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from tcbench.config.check import problems_of
from tcbench.config.document import Document, Field, Problem, read_document
from tcbench.config.preview import WHOLE, Asked, narrowed
from tcbench.config.suite import Suite, with_trainings
from tcbench.errors import UserError, did_you_mean
from tcbench.outside.places import suite_files

Config = TypeVar("Config", bound=BaseModel)

NAMED = frozenset({"rows", "ablations", "files"})
"""Fields of a suite whose members are looked at one by one: one that is broken hides no problem of the others."""


def load_suite(path: Path | str, asked: Asked = WHOLE) -> Suite:
    """Read and check a suite config.

    Args:
        asked: the part of it that is wanted.

    Raises:
        UserError: a line for everything that is wrong with it, naming the file, the field and the fix; or it is a speed
            suite, or has no such part.
    """
    document = read_config(Path(path))
    if is_timed(document):
        raise UserError(f"{path}: a speed suite, of which nothing is sampled or scored; `tcbench bench` times it")
    found = [*document.problems, *_schema_problems(document.value, Suite)]
    broken = {problem.field[: 1 + (problem.field[0] in NAMED)] for problem in found if problem.field}
    suite = _what_is_whole(document.value, broken) if found else Suite.model_validate(document.value)
    if problems := [*found, *problems_of(suite, broken)]:
        raise document.error(problems)
    return with_trainings(narrowed(suite, asked))


def read_config(path: Path) -> Document:
    """The fields of a YAML config, unchecked.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    if not path.exists():
        known = sorted({*(file.name for file in path.parent.glob("*.yaml")), *suite_files()})
        raise UserError(f"{path}: no such config; {did_you_mean(path.name, known)}")
    document = read_document(path)
    if not isinstance(document.value, dict):
        raise UserError(f"{path}: must be a mapping of fields; see config/digits.yaml")
    return document


def is_timed(document: Document) -> bool:
    """Whether a config is a speed suite's, of several models, and not one of samples and scores."""
    return "models" in document.value


def validated(document: Document, schema: type[Config]) -> Config:
    """A config checked against its schema.

    Raises:
        UserError: a line for every problem, naming the file, the field and the fix.
    """
    if problems := [*document.problems, *_schema_problems(document.value, schema)]:
        raise document.error(problems)
    return schema.model_validate(document.value)


def _schema_problems(value: Any, schema: type[BaseModel]) -> list[Problem]:
    """What the schema refuses; a key that lacks because it is misspelt is not reported twice."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        problems = [(problem["type"], _explain(problem, schema)) for problem in error.errors()]
        meant = {
            (*problem.field[:-1], near[1])
            for kind, problem in problems
            if kind == "extra_forbidden" and (near := re.search(r"did you mean '(.*)'\?$", problem.says))
        }
        return [problem for kind, problem in problems if kind != "missing" or problem.field not in meant]
    return []


def _what_is_whole(raw: Mapping[str, Any], broken: set[Field]) -> Suite:
    """The suite as far as its parts are valid; what is broken or missing is no attribute of it."""
    parts: dict[str, Any] = {}
    for name, field in Suite.model_fields.items():
        if name in raw and (name,) not in broken:
            value = raw[name]
            if name in NAMED:
                value = {key: inner for key, inner in value.items() if (name, key) not in broken}
            kind: Any = field.annotation
            parts[name] = TypeAdapter(kind).validate_python(value)
    return Suite.model_construct(set(parts), **parts)


def _explain(problem: Any, schema: type[BaseModel]) -> Problem:
    """A problem of the schema in our words."""
    place = tuple(str(part) for part in problem["loc"] if part != "[key]")
    message = re.sub(r"^Value error, | or instance of \w+$", "", problem["msg"])
    message = message[0].lower() + message[1:]
    if problem["type"] == "extra_forbidden":
        for part in place[:-1]:
            if part in schema.model_fields:  # other parts are keys of a mapping or places in a list
                schema = _model_in(schema.model_fields[part].annotation) or schema
        known = [info.alias or name for name, info in schema.model_fields.items()]
        return Problem(place, f"unknown key; {did_you_mean(place[-1], known)}")
    if problem["type"] in ("missing", "unknown", "name"):
        return Problem(place, message)
    return Problem(place, f"{message}, not {_shortened(problem['input'])}")


def _shortened(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The config model that a field's type is or holds."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)
