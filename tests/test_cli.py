"""The command line: help without torch, one-line errors, and what each light command prints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tcbench import listing
from tcbench.cli import _parser, main
from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.models.specs import MODELS
from tcbench.outside.places import suite_files
from tcbench.record.files import PROVENANCE
from tcbench.registry import method_class, method_names
from tcbench.report.table import Table

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
    done = subprocess.run([sys.executable, "-m", "tcbench", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tcbench ")


def test_validate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", DIGITS]) == 0
    out = capsys.readouterr().out
    assert "valid; suite digits" in out and "nfe50-random: random_tokens, NFE 50, trained as nfe50-tokencache" in out


def test_a_speed_suite_is_validated_and_told_from_one_of_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "tests/speed_smoke.yaml"]) == 0
    said = capsys.readouterr().out
    assert "speed suite speed-smoke" in said
    assert "tiny-dit.fp32.b8.nfe4: nfe4-uncached, nfe4-fora" in said
    assert "`tcbench bench` times it" in fails(capsys, "sample", "tests/speed_smoke.yaml", "--rows", "nfe6-uncached")
    assert "not a speed suite" in fails(capsys, "bench", "--config", DIGITS)
    assert "random weights" in fails(capsys, "validate", "tests/speed_smoke.yaml", "--files")


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
    (tmp_path / "o.yaml").touch()
    assert "no such config; known: " in fails(capsys, "validate", str(tmp_path / "none.yaml"))
    assert "no such config; did you mean 'o.yaml'?" in fails(capsys, "validate", str(tmp_path / "oo.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [("sample", "--rows"), ("score", "--rows"), ("train", "--row"), ("diagnose", "--row")],
    ids=lambda a: a[0],
)
def test_unknown_rows(capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]) -> None:
    error = fails(capsys, arguments[0], DIGITS, arguments[1], "nfe50-tokencash")
    assert f"{DIGITS}: no row 'nfe50-tokencash'; did you mean 'nfe50-tokencache'?" in error


@pytest.mark.parametrize(("command", "says"), [("train", "trains nothing"), ("diagnose", "has no predictor")])
def test_rows_without_a_predictor(capsys: pytest.CaptureFixture[str], command: str, says: str) -> None:
    error = fails(capsys, command, DIGITS, "--row", "nfe50-uncached")
    assert f"row nfe50-uncached: {says}" in error and "nfe50-tokencache" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--method forra --nfe 50", "method 'forra': no file forra.py in methods/; did you mean 'fora'?"),
        ("--method FORA --nfe 50", "did you mean 'fora'?"),
        ("--method Learning-to-Cache --nfe 50", "did you mean 'learning_to_cache'?"),
        ("--method fora --nfe 50 --set intervall=3", "methods/fora.py: unknown option 'intervall'"),
        ("--method fora --nfe 50 --set interval=0", "interval: Input should be greater than 0, not 0"),
        ("--method fora --nfe 50 --set interval", "--set interval: give KEY=VALUE"),
        ("--method fora --nfe 50 --set interval=[", "--set interval: not valid YAML"),
        ("--method fora --nfe 1", "tcbench: --nfe 1: give 2 to 1000"),
        ("--method fora --nfe 10 --set num_full_steps=11", "num_full_steps=11 must lie between 1 and"),
        ("--method fewer_steps --nfe 20", "fewer_steps: steps: 21 are more than the run's 20; give 20 or fewer"),
        ("--method fora --nfe 0", "tcbench: --nfe 0: give 2 to 1000"),
        ("--method fora --nfe ten", "tcbench: --nfe ten: give 2 to 1000"),
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


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("macs --model dit-xl-2-25 --method fora --nfe 50", "'dit-xl-2-25' is unknown; did you mean 'dit-xl-2-256'?"),
        ("macs --model DiT-XL/2 --method fora --nfe 50", "did you mean 'dit-xl-2-256' or 'dit-xl-2-512'?"),
        ("figures digits fig10_deviatoin", "did you mean 'fig10_deviation'?"),
        ("ablate digits --name cache-ratio", "did you mean 'cache_ratio'?"),
        ("match --suite digits --row nfe20-forra", "did you mean 'nfe20-fora'?"),
        ("report digit", "did you mean 'digits'?"),
    ],
)  # fmt: skip
def test_near_misses(capsys: pytest.CaptureFixture[str], command: str, says: str) -> None:
    assert says in fails(capsys, *command.split())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("run digits --limit 8", "tcbench run: error: unrecognized arguments: --limit 8; did you mean '--samples'?"),
        ("run digits --limit=8", "did you mean '--samples'?"),
        ("sample digits --rows fora --smples 8", "did you mean '--samples'?"),
        ("golden here --limit 8", "unrecognized arguments: --limit 8; known: --help, --methods"),
        ("audit here", "unrecognized arguments: here\n"),
        ("ru digits", "argument COMMAND: unknown 'ru'; did you mean 'run'?"),
        ("list sutes", "unknown 'sutes'; did you mean 'suites'?"),
        ("list xyzzy", "unknown 'xyzzy'; known: suites, "),
    ],
)
def test_what_the_command_line_does_not_know(capsys: pytest.CaptureFixture[str], command: str, says: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(command.split())
    assert refused.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["figures --overwrite digits a b", "figures digits a --overwrite b", "figures digits --overwrite a b"]
)
def test_names_may_follow_options(words: str) -> None:
    parsed = _parser().parse_args(words.split())
    assert (parsed.config.name, parsed.names, parsed.overwrite) == ("digits.yaml", ["a", "b"], True)


def printed_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("what", ["models", "methods", "metrics"])
def test_lists(capsys: pytest.CaptureFixture[str], what: str) -> None:
    known = {"models": MODELS, "methods": method_names(), "metrics": METRICS}[what]
    assert printed_json(capsys, "list", what).keys() == {*known}
    assert main(["list", what]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*known]


def test_suites_and_their_tables_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "suite_files", lambda: {name: suite_files()[name] for name in ("demo", "speed")})
    suites = printed_json(capsys, "list", "suites")
    assert suites["demo"]["kind"] == "samples" and "uncached" in suites["demo"]["rows"]
    assert suites["speed"]["kind"] == "speed"
    assert printed_json(capsys, "list", "tables").keys() == {"demo/table", "demo/verdicts"}


def test_what_prints_facts_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed_json(capsys, "methods", "fora")["fora"]["options"]["placement"] == "end"
    assert printed_json(capsys, "validate", "demo")["rows"]["fora"] == {
        "method": "fora", "nfe": 20, "label": "FORA", "trained_as": None, "target": None,
    }  # fmt: skip
    estimate = printed_json(capsys, "macs", "--model", "tiny-dit", "--method", "learning_to_cache", "--nfe", "20")
    assert "floor" in estimate["estimate"] and estimate["per_sample"] > 0


def test_an_estimate_says_so_first_and_no_setting_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["macs", "--model", "tiny-dit", "--method", "learning_to_cache", "--nfe", "20"]) == 0
    assert "an estimate: it lacks a router" in capsys.readouterr().out.splitlines()[1]
    assert main(["match", "--model", "tiny-dit", "--method", "fora", "--nfe", "20", "--macs", "1e3"]) == 1
    assert "no setting within 1.00%; nearest: num_full_steps" in capsys.readouterr().out


def test_completion_knows_commands_options_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = "COMP_WORDS=({}); COMP_CWORD={}; _tcbench; echo ${{COMPREPLY[@]}}"
    for words, expected in (("tcbench val", "validate"), ("tcbench match --method tokenc", "tokencache"),
                            ("tcbench report dig", "digits"), ("tcbench macs --js", "--json")):  # fmt: skip
        line = script + "\n" + ask.format(words, len(words.split()) - 1)
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split(), words


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.index("start here:") < out.index("\n  run ") < out.index("look at results") < out.index("\n  report ")
    commands = next(action for action in _parser()._actions if action.choices).choices
    assert all(f"\n  {command} " in out for command in commands)


def test_published_results_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("T", "", tidy=pd.DataFrame({"a": [1]}), formatted=pd.DataFrame({"a": ["1"]}))
    folder = tmp_path / "digits" / "tables"
    folder.mkdir(parents=True)
    table.write(folder, "table2")
    (tmp_path / "digits" / PROVENANCE).write_text("{}", encoding="utf-8")
    table.write(folder, "table2", overwrite=False)  # the same bytes
    other = replace(table, title="U")
    with pytest.raises(UserError, match=r"table2\..*: published, and rendered differently now"):
        other.write(folder, "table2", overwrite=False)
    assert "## T" in (folder / "table2.md").read_text(encoding="utf-8")
    other.write(folder, "table2")
    assert "## U" in (folder / "table2.md").read_text(encoding="utf-8")


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
