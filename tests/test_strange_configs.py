"""A config from a stranger is data: it is refused in lines that name file and field, or it is harmless."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcbench.budget.borrowing import check_borrowing
from tcbench.cli import main
from tcbench.config.depends import STAGES
from tcbench.config.load import load_suite
from tcbench.config.needs import needs
from tcbench.errors import UserError
from tests.test_config import VALID

CASES = 600
BASE = copy.deepcopy(VALID) | {
    "ablations": {
        "ratio": {
            "title": "Cache ratio",
            "question": "How many?",
            "base": "ours",
            "guidance_scales": [1.0, 2.0],
            "rows": {"r9": {}, "r5": {"options": {"cache_ratio": 0.5}}, "router": {"base": "fora", "label": "FORA"}},
        }
    },
    "files": {"more": {"path": "more.bin", "used": "a test", "get": "nowhere"}},
}
TEXT = yaml.safe_dump(BASE, sort_keys=False)

SCALARS = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**70,
        -(2**70),
        0.5,
        1e308,
        -1e-308,
        float("nan"),
        float("inf"),
        "",
        " ",
        "no",
    ),
    *("../../../evil", "/evil", "a b", "a{b}", "{0.__class__}", "a\nb", "\x07", "é", "random", "uncached", "x" * 5000),
    *("verdicts", "table1", "local_error", "ablation-x", "reference", "floor", "latents", "..", ".", "~", "-", "nfe20"),
]
AS_WRITTEN = [
    "024",
    "0o24",
    "0x14",
    "1_000",
    ".nan",
    "-.inf",
    "1e999",
    "9" * 5000,
    "yes",
    "Off",
    "!!python/name:os.system x",
]
"""Scalars that reach the file as they are."""
STRUCTURES: list[Callable[[], Any]] = [
    lambda: [],
    lambda: {},
    lambda: [1, "a", None],
    lambda: {"a": {"b": [1]}},
    lambda: [[[[1]]]],
    lambda: {"method": "uncached", "nfe": 20},
    lambda: {"": 1},
    lambda: list(range(300)),
]


def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Everything in a config that can be changed."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield *path, key
        yield from places(item, *path, key)


def mutated(draw: random.Random) -> bytes:
    """The base config with one to three things done to its data, or one to its text."""
    config = copy.deepcopy(BASE)
    if draw.random() < 0.3:
        return draw.choice(TEXTUAL)(draw, TEXT)
    written: dict[str, str] = {}
    for _ in range(draw.choice([1, 1, 2, 3])):
        everywhere = list(places(config))
        if not everywhere:
            break
        *path, last = draw.choice(everywhere)
        parent = config
        for key in path:
            parent = parent[key]
        match draw.randrange(7):
            case 0:
                del parent[last]
            case 1 | 2:
                parent[last] = draw.choice(SCALARS)
            case 3:
                parent[last] = draw.choice(STRUCTURES)()
            case 4:
                parent[last] = mark = f"mark{len(written)}"
                written[mark] = draw.choice(AS_WRITTEN)
            case 5:
                name = draw.choice([str(scalar) for scalar in SCALARS])
                new = {name: draw.choice(SCALARS)}
                parent[last] = parent[last] | new if isinstance(parent[last], dict) else new
            case 6 if isinstance(parent, dict):
                parent[draw.choice([str(scalar) for scalar in SCALARS])] = parent.pop(last)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    for mark, scalar in written.items():
        text = text.replace(mark, scalar)
    return text.encode("utf-8", errors="surrogatepass")


def _twice(draw: random.Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    return "".join([*lines[: number + 1], *lines[number:]]).encode()


def _cut(draw: random.Random, text: str) -> bytes:
    return text[: draw.randrange(len(text))].encode()


def _inserted(draw: random.Random, text: str) -> bytes:
    place = draw.randrange(len(text))
    odd = [
        "\t",
        "\x00",
        "\ufeff",
        "\u2028",
        "{",
        "[",
        ":",
        "- ",
        "&a ",
        "*a ",
        "!!binary ",
        "%",
        "'",
        '"',
        "|",
        "\r",
        "…",
        "#",
    ]
    return (text[:place] + draw.choice(odd) + text[place:]).encode()


def _deep(draw: random.Random, text: str) -> bytes:
    opening = draw.choice(["[", "{a: ", "- "])
    return f"{text}more: {'' if opening != '- ' else chr(10)}{opening * draw.choice([5, 50, 5000])}".encode()


def _alias(draw: random.Random, text: str) -> bytes:
    return text.replace("sampler:", "sampler: &a", 1).encode() + b"more: [*a, *a]\n"


def _encoded(draw: random.Random, text: str) -> bytes:
    return text.replace("fixed", "fest, groß").encode(draw.choice(["utf-16", "latin-1", "utf-8-sig", "utf-32"]))


def _noise(draw: random.Random, text: str) -> bytes:
    return draw.randbytes(draw.randrange(200))


TEXTUAL = [_twice, _cut, _inserted, _deep, _alias, _encoded, _noise]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with code that leaves a mark when it is run."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in (tmp_path, tmp_path / "work"):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    return tmp_path


def refusal(path: Path) -> str | None:
    """What `tcbench validate --files` would refuse a config with; one that it does not refuse can be worked with."""
    try:
        suite = load_suite(path)
    except UserError as error:
        return str(error)
    try:
        check_borrowing(suite)
    except UserError as error:
        return "\n".join(f"{path}: {line}" for line in str(error).splitlines())
    needs(suite)
    for part in (suite, *suite.ablation_suites.values()):
        for entry in part.entries:
            assert all(entry.settings(stage) for stage in STAGES)
            assert entry.scores.is_relative_to("results") and ".." not in entry.scores.parts
    return None


def test_strange_configs_are_refused_by_file_and_field_or_harmless(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, path = random.Random(14), Path("mini.yaml")
    there = sorted(folder.rglob("*"))
    refused = 0
    for number in range(CASES):
        content = mutated(draw)
        path.write_bytes(content)
        try:
            said = refusal(path)
            for line in (said or "").splitlines():
                assert line.startswith("mini.yaml: ") and line.isprintable() and len(line) < 1000, line
            if number % 50 == 0:
                assert main(["validate", "mini.yaml", "--files"]) == (2 if said else 1)  # `files` names one that lacks
                printed = capsys.readouterr().err
                assert printed == "".join(f"tcbench: {line}\n" for line in (said or "").splitlines())
        except Exception as error:
            raise AssertionError(f"case {number}:\n{content[:3000]!r}") from error
        refused += said is not None
    path.unlink()
    assert sorted(folder.rglob("*")) == there, "something was written, or code has run"
    assert 0.6 < refused / CASES < 0.98, "the mutations do not reach both kinds"
