"""README.md is true: what was found is what the committed results say; links lead to files, commands exist."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tcbench.cli import _parser
from tcbench.report.summary import BEGIN, END, drawn_from, panels, read_published, summary
from tcbench.workflow import SUITES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "results/reference/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
REFERENCE = Path("results/reference")
COMMAND = re.compile(r"^(?:`)?tcbench ([a-z-]+)((?: [^`#\n]*)?)", re.MULTILINE)


def commands_of(page: str) -> list[tuple[str, str]]:
    """(sub-command, the rest) of every line of a shell block that calls tcbench, and of every `tcbench ...` in text."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    lines += re.findall(r"`(tcbench [^`]+)`", page)
    return [found.groups() for line in lines if (found := COMMAND.match(line))]


def test_what_was_found_is_what_the_committed_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a publication, `tcbench summary results/reference --write README.md` makes it so again."""
    monkeypatch.chdir(ROOT)
    shown = README.partition(BEGIN)[2].partition(END)[0]
    assert [line[2:] for line in shown.splitlines() if line.startswith("- ")] == summary(REFERENCE)
    picture = (ROOT / re.search(r"!\[.*?\]\((\S+\.svg)\)", shown)[1]).read_text(encoding="utf-8")
    assert drawn_from(panels(read_published(REFERENCE))) in picture


def test_it_is_short_and_names_the_paper() -> None:
    assert len(README.splitlines()) <= 110
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    authors = citation["preferred-citation"]["authors"]
    assert [author["family-names"] for author in authors] == ["Lou", "Luo", "Liu", "Li", "Ding", "Hu", "Li", "Ma"]
    head = README.partition("## What was found")[0].replace("\n", " ")
    for author in authors:
        assert f"{author['given-names'][0]}. {author['family-names']}" in head
    assert "2409.18523" in head and "2409.18523" in citation["preferred-citation"]["journal"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_it_names_the_suites_that_run() -> None:
    named = re.findall(r"^\| `([a-z]+)` \|", README, re.MULTILINE)
    assert set(SUITES) <= set(named) and all((ROOT / "config" / f"{name}.yaml").exists() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] != "results"], ids=str)
def test_commands_that_pages_name_exist(page: Path) -> None:
    known = next(action for action in _parser()._actions if action.choices).choices
    for command, rest in commands_of((ROOT / page).read_text(encoding="utf-8")):
        if command == "--help":
            continue
        assert command in known, command
        options = {option for action in known[command]._actions for option in action.option_strings}
        for option in re.findall(r"(?<= )(--[a-z-]+)", rest):
            assert option in options, f"{command} {option}"


def test_methods_that_the_pages_name_exist() -> None:
    text = README + (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(?:methods/)?(\w+)\.py`", text):
        assert (ROOT / "methods" / f"{name}.py").exists() or name == "mine", name
