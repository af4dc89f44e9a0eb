"""Reading YAML: one line of complaint that names file, field and fix."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tcbench.config.check import check_ablations, check_rows
from tcbench.config.suite import TRAININGS, Suite, with_trainings
from tcbench.errors import UserError, did_you_mean
from tcbench.places import suite_files

Config = TypeVar("Config", bound=BaseModel)


def load_suite(path: Path | str) -> Suite:
    """Read and check a suite config.

    Raises:
        UserError: one line that names the file, the field and the fix.
    """
    path = Path(path)
    suite = validated(path, read_mapping(path), Suite)
    check_rows(path, suite)
    if suite.training_seeds > 1 and TRAININGS in suite.ablations:
        raise UserError(f"{path}: ablations.{TRAININGS}: is made for training_seeds; give yours another name")
    suite = with_trainings(suite)
    check_ablations(path, suite)
    return suite


def read_mapping(path: Path) -> dict[str, Any]:
    """The fields of a YAML config, unchecked.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = sorted({*(file.name for file in path.parent.glob("*.yaml")), *suite_files()})
        raise UserError(f"{path}: no such config; {did_you_mean(path.name, known)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of fields; see config/digits.yaml")
    return raw


def validated(path: Path, raw: dict[str, Any], schema: type[Config]) -> Config:
    """A config checked against its schema.

    Raises:
        UserError: one line that names the file, the field and the fix.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        # an unknown key first: it is often the misspelling of one reported missing
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise UserError(_explain(path, problems[0], schema)) from error


def _explain(path: Path, problem: Any, schema: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        given = f", not {problem['input']!r}" if problem["type"] not in ("missing", "unknown") else ""
        return f"{path}: {field}: {problem['msg'][0].lower() + problem['msg'][1:]}{given}"
    for part in problem["loc"][:-1]:
        if part in schema.model_fields:  # other parts are keys of a mapping or places in a list
            schema = _model_in(schema.model_fields[str(part)].annotation) or schema
    known = [info.alias or name for name, info in schema.model_fields.items()]
    return f"{path}: {field}: unknown key; {did_you_mean(str(problem['loc'][-1]), known)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The config model that a field's type is or holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)
