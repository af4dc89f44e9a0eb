"""The command line: help without torch, one-line errors, and what each light command prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tcbench.cli import main
from tcbench.registry import method_class, method_names

DIGITS = str(Path(__file__).parent.parent / "config" / "digits.yaml")

HELP = """
import io, sys, contextlib
from tcbench.cli import _parser, main

def help_of(*arguments):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main([*arguments, "--help"])
    except SystemExit as left:
        assert left.code == 0, arguments
    assert out.getvalue().startswith("usage: tcbench " + " ".join(arguments)), arguments

commands = next(action for action in _parser()._actions if action.choices).choices
assert len(commands) >= 13, commands
help_of()
for command in commands:
    help_of(command)
assert "torch" not in sys.modules
"""


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail on bad input."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("tcbench: ") and captured.err.count("\n") == 1
    return captured.err


def test_help_of_everything_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_installed_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tcbench.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tcbench ")


def test_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", DIGITS]) == 0
    out = capsys.readouterr().out
    assert "valid; suite digits" in out and "nfe50-random: random_tokens, NFE 50, trained as nfe50-tokencache" in out


def test_validate_sees_artefacts_that_were_trained_otherwise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = Path(DIGITS).read_text(encoding="utf-8")
    assert "r0.7: {label: r = 0.7, options: {cache_ratio: 0.7}" in text
    changed = tmp_path / "digits.yaml"
    changed.write_text(text.replace("options: {cache_ratio: 0.7}", "options: {refiner_blocks: 3}"), encoding="utf-8")
    assert "row cache_ratio-r0.7: its options change what nfe50-tokencache was trained with" in fails(
        capsys, "validate", str(changed)
    )


def test_missing_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such config" in fails(capsys, "validate", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [("sample", "--rows"), ("score", "--rows"), ("train", "--row"), ("diagnose", "--row")],
    ids=lambda a: a[0],
)
def test_unknown_rows(capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]) -> None:
    error = fails(capsys, arguments[0], DIGITS, arguments[1], "nfe50-tokencash")
    assert f"{DIGITS}: no row 'nfe50-tokencash'; rows: " in error and "nfe50-tokencache" in error


@pytest.mark.parametrize(("command", "says"), [("train", "trains nothing"), ("diagnose", "has no predictor")])
def test_rows_without_a_predictor(capsys: pytest.CaptureFixture[str], command: str, says: str) -> None:
    error = fails(capsys, command, DIGITS, "--row", "nfe50-uncached")
    assert f"row nfe50-uncached: {says}" in error and "nfe50-tokencache" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--method forra --nfe 50", "method 'forra': no file forra.py in methods/; did you mean 'fora'?"),
        ("--method fora --nfe 50 --set intervall=3", "methods/fora.py: unknown option 'intervall'"),
        ("--method fora --nfe 50 --set interval=0", "methods/fora.py: interval: "),
        ("--method fora --nfe 50 --set interval", "--set interval: give KEY=VALUE"),
        ("--method fora --nfe 50 --set interval=[", "--set interval: not valid YAML"),
        ("--method fora --nfe 1", "nfe: 1 sampling steps; give 2 to 1000"),
        ("--method fora --nfe 10 --set num_full_steps=11", "num_full_steps=11 must lie between 1 and"),
        ("--method tokencache --nfe 30", "tokencache: the paper names no num_full_steps and beta"),
    ],
)
def test_macs_of_the_impossible(capsys: pytest.CaptureFixture[str], arguments: str, says: str) -> None:
    assert says in fails(capsys, "macs", "--model", "dit-xl-2-256", *arguments.split())


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} (knob: " in out for name in method_names())


@pytest.mark.parametrize("name", method_names())
def test_one_method(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert method_class(name).__doc__.rstrip() in out
    assert all(f"{option} = {info.default!r}" in out for option, info in method_class(name).model_fields.items())


def test_a_terminal_that_lacks_letters_is_no_traceback(tmp_path: Path) -> None:
    code = "from tcbench.cli import main; main(['audit', '--out', 'ü/audit.md'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and r"\xfc/audit.md: " in done.stdout, done.stderr
