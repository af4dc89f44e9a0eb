"""A YAML file as plain data, with the line of every field, and with what must not stand in a config.

YAML has its surprises: of a key that is given twice the last one counts, `no` is false, `024` is 20, `.nan` a number,
and tags make objects. None of that is guessed at here; each is a problem that names its line and its field.
"""

import math
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tcbench.errors import UserError

Field = tuple[str, ...]
"""A place in a config: `("rows", "nfe20-fora", "nfe")`."""

LONGEST_FILE = 1_000_000  # bytes; the largest config here has 20 000
LONGEST_TEXT = 4_000  # characters
LONGEST_LINE = 600  # characters of a message
DEEPEST = 20  # levels; the schema has six

_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}
_NULL = re.compile("|~|null|Null|NULL")
_TRUE, _FALSE = re.compile("true|True|TRUE"), re.compile("false|False|FALSE")
_SWITCH = re.compile("yes|no|on|off", re.IGNORECASE)
_WHOLE = re.compile("[-+]?(0|[1-9][0-9]*)")
_PADDED = re.compile("[-+]?0[0-9_]+")
_OTHER_BASE = re.compile("[-+]?0[oxb][0-9a-fA-F_]+|[-+]?[0-9]+_[0-9_]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a field, and what to do about it."""

    field: Field
    says: str


@dataclass
class Document:
    """What a file says.

    Attributes:
        path: the file.
        value: its content; what is wrong with it stands there as text.
        lines: the lines of its fields, from 1 on.
        problems: what must not stand in a config.
    """

    path: Path
    value: Any = None
    lines: dict[Field, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line(self, place: Field) -> int:
        """The line of a field, or of the nearest one around it that is there."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def error(self, problems: list[Problem]) -> UserError:
        """All of these, a line each, in the order of the file; of one field the first."""
        first: dict[Field, Problem] = {}
        for problem in problems:
            first.setdefault(problem.field, problem)
        ordered = sorted(first.values(), key=lambda problem: self.line(problem.field))
        return UserError("\n".join(map(self._explain, ordered)))

    def _explain(self, problem: Problem) -> str:
        place = f" (line {self.line(problem.field)})" if self.lines else ""
        name = ".".join(part if _is_plain(part) else repr(part[:60]) for part in problem.field) or "the file"
        return f"{self.path}: {name}: {_in_a_line(problem.says)}{place}"


def _is_plain(text: str) -> bool:
    return len(text) <= 100 and text.isprintable()


def _in_a_line(text: str) -> str:
    """A message that may quote what the file says, fit to be read."""
    text = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def read_document(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        UserError: it is missing, unreadable, huge, or no YAML at all.
    """
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8-sig") if size <= LONGEST_FILE else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: no UTF-8 text at byte {error.start}; save it as UTF-8") from error
    if size > LONGEST_FILE:
        raise UserError(f"{path}: {size} bytes; a config has at most {LONGEST_FILE}")
    return parse(text, path)


def parse(text: str, path: Path) -> Document:
    """The document in a text.

    Raises:
        UserError: it is no YAML, or nested too deeply.
    """
    document = Document(path)
    try:
        node = _composed(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        says = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise UserError(f"{path}: not valid YAML: {says} (line {mark.line + 1 if mark else 1})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if node is not None:
        document.value = _value(document, node, ())
    return document


class _Loader(yaml.SafeLoader):
    """Composes nodes, as deep as a config may be and without aliases, whose copies could multiply without end."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "an alias; write the value out", event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels deep; flatten it", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@lru_cache(maxsize=32)
def _composed(text: str) -> Any:
    """The nodes of a text, which nobody changes: a workflow reads its configs several times."""
    return _Loader(text).get_single_node()


def _value(document: Document, node: Any, place: Field) -> Any:
    document.lines.setdefault(place, node.start_mark.line + 1)
    if node.tag not in _TAGS:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        document.problems.append(Problem(place, f"tags such as {tag[:60]!r} are not read; remove it"))
    if isinstance(node, yaml.SequenceNode):
        return [_value(document, item, (*place, str(number))) for number, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(document, node, place)
    value, says = _scalar(node)
    if says:
        document.problems.append(Problem(place, says))
    return value


def _mapping(document: Document, node: Any, place: Field) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in node.value:
        if not isinstance(key, yaml.ScalarNode):
            document.problems.append(
                Problem(place, f"keys should be words; in line {key.start_mark.line + 1} is another")
            )
            continue
        name, line = key.value, key.start_mark.line + 1
        if name in found:
            earlier = document.lines[*place, name]
            document.problems.append(Problem((*place, name), f"given twice, in lines {earlier} and {line}; remove one"))
            continue
        document.lines[*place, name] = line
        found[name] = _value(document, inner, (*place, name))
    return found


def _scalar(node: Any) -> tuple[Any, str | None]:
    """(what a scalar means, what is wrong with it)."""
    text = node.value
    if len(text) > LONGEST_TEXT:
        return text[:LONGEST_TEXT], f"{len(text)} characters; give at most {LONGEST_TEXT}"
    if _CONTROL.search(text):
        return "", "holds control characters; remove them"
    return read_scalar(text) if node.style is None else (text, None)


def read_scalar(text: str) -> tuple[Any, str | None]:
    """(what a plain scalar means, what is wrong with it): null, true, false, a decimal number, or else text."""
    if _NULL.fullmatch(text):
        return None, None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text[0] in "tT", None
    if _SWITCH.fullmatch(text):
        return text, f"write true or false, or '{text}' in quotes, in place of {text}"
    if _PADDED.fullmatch(text):
        return text, f"write {text.lstrip('+-0') or '0'}, or '{text[:30]}' in quotes: YAML reads {text[:30]} in base 8"
    if _OTHER_BASE.fullmatch(text):
        return text, f"write {text[:30]} as a plain decimal number, or in quotes"
    if _NOT_FINITE.fullmatch(text):
        return text, f"{text} is no finite number; give one"
    if _WHOLE.fullmatch(text):
        return (
            (int(text), None) if len(text) < 19 else (text[:30], f"a number of {len(text)} digits; give a smaller one")
        )
    if _NUMBER.fullmatch(text):
        number = float(text)
        return number, None if math.isfinite(number) else f"{text[:30]} is no finite number; give a smaller one"
    return text, None
