"""docs/config.md, every key of a suite's config, from the schema; `python -m tcbench.config.page` writes it again."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tcbench.config.depends import STAGES
from tcbench.config.fields import (
    AblationName,
    DataName,
    ExtractorName,
    MethodName,
    MetricName,
    ModelName,
    RowName,
    SuiteName,
    TableName,
)
from tcbench.config.suite import Suite

PAGE = Path(__file__).parents[2] / "docs" / "config.md"

HEAD = """\
# The keys of a suite's config

Made of the schema (`tcbench/config/fields.py`) by `python -m tcbench.config.page`. `tcbench validate SUITE` names the
file and the field of everything that is wrong with a config. Keys without a default must be given. Paths are relative
to the working directory, `~` is your home.

A config is data: it runs no code but the methods and data sets that it names, which are found by name in the folders
that you search, and nothing that it says is written anywhere but below `results/`.

A stage's results depend on whole groups: changing a key makes again what was made by the stages that its group counts
for. What is rendered depends on everything.
"""

_CHECKED: tuple[tuple[Any, str], ...] = (
    (ModelName, "a model"),
    (DataName, "a data set"),
    (MetricName, "a metric"),
    (ExtractorName, "an extractor"),
    (MethodName, "a method"),
    (RowName, "a row"),
    (SuiteName, "a name"),
    (TableName, "a name"),
    (AblationName, "a name"),
)
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    Any: "any value",
}
_BOUNDS = {"gt": "more than {}", "ge": "{} or more", "lt": "less than {}", "le": "{} or less"}


def page() -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, *_section("Top level", Suite, ())])


def _section(title: str, model: type[BaseModel], place: tuple[str, ...]) -> Iterator[str]:
    """A model's keys as a table, and then the models that they hold."""
    yield f"## {title}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    if len(place) == 1 and (stages := [stage for stage, needs in STAGES.items() if place[0] in needs.groups]):
        yield f"Counts for: {', '.join(f'`{stage}`' for stage in stages)}.\n"
    yield "| key | value | default | what it is |"
    yield "|---|---|---|---|"
    inner: list[tuple[str, type[BaseModel], tuple[str, ...]]] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        text = " ".join((field.description or "").split())
        yield f"| `{key}` | {_kind(field)} | {_default(field)} | {text} |"
        if found := _held(field.annotation):
            step = (key, "NAME") if get_origin(field.annotation) is dict else (key,)
            inner.append((f"`{'.'.join((*place, *step))}`", found, (*place, *step)))
    yield ""
    for section in inner:
        yield from _section(*section)


def _kind(field: FieldInfo) -> str:
    """What may stand there, in words."""
    bounds = [
        words.format(f"{value:.12g}")
        for part in field.metadata
        for bound, words in _BOUNDS.items()
        if (value := getattr(part, bound, None)) is not None
    ]
    return ", ".join([_words(field.annotation, field.metadata), *bounds])


def _words(annotation: Any, metadata: list[Any] | None = None) -> str:
    for known, name in _CHECKED:  # the check is all that tells these from text
        if annotation == known or (metadata and known.__metadata__[0] in metadata):
            return name
    if annotation in _WORDS:
        return _WORDS[annotation]
    inner = [part for part in get_args(annotation) if part not in (NoneType, Ellipsis)]
    match get_origin(annotation):
        case origin if origin is Literal:
            return " or ".join(f"`{value}`" for value in inner)
        case origin if origin in (Union, UnionType):
            nothing = [" or `null`"] if NoneType in get_args(annotation) else []
            return " or ".join(_words(part) for part in inner) + "".join(nothing)
        case origin if origin is tuple:
            return f"a list, each {_words(inner[0])}"
        case origin if origin is dict:
            return f"by name: {_words(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys below"
    base, *more = inner  # Annotated
    return _words(base, more)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    match value:
        case BaseModel():
            return "below"
        case None:
            return "`null`"
        case bool():
            return f"`{str(value).lower()}`"
        case tuple():
            return f"`[{', '.join(map(str, value))}]`"
        case dict():
            return f"`{{{', '.join(value)}}}`"
        case _:
            return f"`{value}`" if str(value) else '`""`'


def _held(annotation: Any) -> type[BaseModel] | None:
    """The model that a field is or holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _held(inner))), None)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
