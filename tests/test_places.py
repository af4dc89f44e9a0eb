"""Methods and suites are found where they ship and where a user keeps them; a name has one meaning."""

import os
import shutil
from pathlib import Path

import pytest

from tcbench.cli import main
from tcbench.errors import UserError, did_you_mean
from tcbench.outside.places import (
    ADDED_METHODS,
    SHIPPED,
    add_methods,
    method_file,
    method_files,
    suite_file,
    suite_files,
    suite_word,
)

METHOD = """
from tcbench.method import Look, Method
from tcbench.plan import Plan


class Placed(Method):
    'Everything is computed.'

    name = "placed"
    label = "placed"

    def plan(self, look: Look) -> Plan:
        return Plan()
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv(ADDED_METHODS, "")
    return tmp_path


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_what_ships_is_found_from_any_folder() -> None:
    assert method_file("fora") == SHIPPED / "methods" / "fora.py"
    assert suite_file("digits") == SHIPPED / "config" / "digits.yaml"
    assert {"tokencache", "uncached"} <= method_files().keys()
    assert {"digits", "scenes", "moving", "speed"} <= suite_files().keys()


def test_a_users_methods_are_added_here_by_the_variable_and_by_the_flag(tmp_path: Path) -> None:
    shipped = method_files().keys()
    write(Path("methods/here.py")), write(Path("methods/_helper.py"))
    write(tmp_path / "one" / "first.py"), write(tmp_path / "two" / "second.py"), write(tmp_path / "three" / "third.py")
    os.environ[ADDED_METHODS] = f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}"
    add_methods([str(tmp_path / "three")])
    assert method_files().keys() - shipped == {"here", "first", "second", "third"}
    assert method_files().keys() > shipped
    assert method_file("here") == Path("methods/here.py")
    assert method_file("third") == tmp_path / "three" / "third.py"


def test_an_added_folder_that_is_not_there_is_an_error_and_not_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--methods", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "tcbench: nowhere: no such folder of methods; correct --methods or $TCBENCH_METHODS\n"
    )


def test_a_users_method_is_listed_with_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("methods/placed.py"), METHOD)  # no other test has a method of this name, whose class a process keeps
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"placed (knob: none) {Path('methods/placed.py')}" in lines
    assert any(line.startswith("fora (knob") and not line.endswith(".py") for line in lines)


@pytest.mark.parametrize(
    ("find", "folder", "name"), [(method_file, "methods", "fora"), (suite_file, "config", "digits")]
)
def test_a_name_has_one_meaning(find, folder: str, name: str) -> None:  # type: ignore[no-untyped-def]
    shipped = find(name)
    copy = Path(folder) / shipped.name
    copy.parent.mkdir()
    shutil.copy(shipped, copy)
    assert find(name) == shipped, "a copy is no other"
    copy.write_text(copy.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"'{name}': {copy} and {shipped} differ; rename yours"):
        find(name)
    assert suite_file(f"./{copy}") == copy, "a path says which file is meant"


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "methods/evil", "_hidden", ""])
def test_only_names_of_files_in_these_folders_are_methods(name: str) -> None:
    write(Path("evil.py")), write(Path("methods/evil.py")), write(Path("methods/_hidden.py"))
    with pytest.raises(UserError, match=r"no file .*\.py in methods/"):
        method_file(name)


def test_near_misses() -> None:
    write(Path("mine.yaml"))
    for given, says in (
        ("digit", "suite 'digit': no file digit.yaml in config/; did you mean 'digits'?"),
        ("mine", "suite 'mine': no file mine.yaml in config/; did you mean 'mine.yaml'?"),
        ("xyzzy", "suite 'xyzzy': no file xyzzy.yaml in config/; known: cifar10, demo, digits, fashion"),
    ):
        with pytest.raises(UserError) as caught:
            suite_file(given)
        assert str(caught.value).startswith(says)
    with pytest.raises(UserError, match="did you mean 'fora'"):
        method_file("FORA")
    assert did_you_mean("x", []) == "known: none"


def test_commands_call_a_suite_the_same_wherever_things_lie() -> None:
    write(Path("config/own.yaml"), "a"), write(Path("mine.yaml"), "b")
    shipped = suite_file("digits")
    assert suite_word("digits") == suite_word(str(shipped)) == "digits"
    assert (
        suite_word("own")
        == suite_word("config/own.yaml")
        == suite_word(str(Path("config/own.yaml").resolve()))
        == "own"
    )
    assert (
        suite_word("mine.yaml")
        == suite_word("./mine.yaml")
        == suite_word(str(Path("mine.yaml").resolve()))
        == "mine.yaml"
    )
    write(Path("digits.yaml"), "c")
    assert suite_word("digits.yaml") == "digits.yaml", "other content than the suite of that name"


def test_suites_are_called_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "digits"]) == 0
    assert "digits.yaml: valid; suite digits" in capsys.readouterr().out
    for command in (
        ["report", "digit"],
        ["run", "digit"],
        ["match", "--suite", "digit"],
        ["bench", "--config", "digit"],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err.endswith("no file digit.yaml in config/; did you mean 'digits'?\n")
