"""Commands that need no tensor start at once: what they import is listed here, and torch is not part of it."""

import json
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from re import match
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

CONFIG = {"pydantic", "yaml"}
PLAN = CONFIG | {"numpy"}
FILES = PLAN | {"PIL", "safetensors", "tqdm"}
PAGE = FILES | {"jinja2", "pandas", "tabulate"}
RESULTS = PAGE | {"scipy"}
FIGURES = RESULTS | {"matplotlib"}

ON_DIGITS = "config/digits.yaml --results RESULTS"
COMMANDS = {
    "--help": CONFIG,
    "methods": PLAN,
    "methods toca": PLAN,
    "macs --model tiny-dit --method uncached --nfe 20": PLAN,
    "macs --model dit-xl-2-256 --method tokencache --nfe 50": PLAN,
    "macs --model pixart-256 --method toca --nfe 20": PLAN,
    "macs --model osp-93x256 --method tome --nfe 20": PLAN,
    "macs --model tiny-dit --method oracle_tokens --nfe 20 --set refiner_blocks=1": PLAN,
    "match --model tiny-dit --method fora --nfe 20 --like learning_to_cache": PLAN,
    "match --model tiny-dit --method fora --nfe 20 --like no_such_method": PLAN,
    "validate config/digits.yaml": PLAN,
    "validate config/paper-pixart-256.yaml --files": FILES,
    "audit --out RESULTS/audit.md": PAGE,
    "claims RESULTS/..": RESULTS,
    f"verdicts {ON_DIGITS}": RESULTS,
    f"tables {ON_DIGITS}": RESULTS,
    f"diagnostics {ON_DIGITS}": RESULTS,
    f"ablations {ON_DIGITS}": RESULTS,
    f"report {ON_DIGITS}": RESULTS,
    f"figures {ON_DIGITS} fig9a_cache_ratio": FIGURES,
}
"""What each command may import of the package's dependencies. One process runs them in this order, so later ones may
import what earlier ones did, and a module is named where it first appears."""
FAILS = {"--like no_such_method": 2, "--files": 1}  # everything else succeeds

RUN = """
import json, sys
from tcbench.cli import main

for command in json.loads(sys.argv[1]):
    try:
        status = main(command.split())
    except SystemExit as stop:  # of --help
        status = stop.code
    print("\\nDONE", json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


class Done(NamedTuple):
    """What a command left behind: its status and the dependencies that were imported."""

    status: int
    imported: set[str]


def run(commands: list[str], code: str = RUN) -> list[Done]:
    arguments = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("DONE ")]
    return [Done(status, dependencies().intersection(modules)) for status, modules in lines]


def dependencies() -> set[str]:
    """The modules of the distributions that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    return {
        module
        for module, names in packages_distributions().items()
        if wanted & {name.lower().replace("_", "-") for name in names}
    }


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    results = tmp_path_factory.mktemp("results") / "digits"
    shutil.copytree(ROOT / "results/reference/digits", results)
    return dict(zip(COMMANDS, run([command.replace("RESULTS", str(results)) for command in COMMANDS]), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_imports(command: str, after: dict[str, Done]) -> None:
    assert after[command].imported <= COMMANDS[command]
    assert after[command].status == next((status for end, status in FAILS.items() if command.endswith(end)), 0)


def test_the_lists_have_eyes(after: dict[str, Done]) -> None:
    """Otherwise they would hold whatever was imported."""
    first, *_, last = after.values()
    assert first.imported == CONFIG and last.imported == FIGURES
    assert {"torch", "diffusers", "transformers", "scipy", "matplotlib", "PIL"} <= dependencies()
    assert "torch" in run(["methods"], RUN.replace("main(command.split())", "__import__('torch') and 0"))[0].imported
