"""Commands that need no tensor start at once: what they import is listed here, and torch is not part of it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from re import match
from typing import NamedTuple

import pytest

from tcbench.config.load import load_suite
from tcbench.record.files import sealed
from tcbench.report.names import figure_names, picture_of

ROOT = Path(__file__).parent.parent

CONFIG = {"pydantic", "typing_extensions", "yaml"}
PLAN = CONFIG | {"numpy"}
FILES = PLAN | {"PIL", "safetensors", "tqdm"}
PAGE = FILES | {"jinja2", "pandas", "tabulate"}
RESULTS = PAGE | {"scipy"}
FIGURES = RESULTS | {"matplotlib", "mpl_toolkits"}

ON_DIGITS = "config/digits.yaml --results published/digits"
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
    "match --suite config/digits.yaml --row nfe20-fora": PLAN,
    "list models": PLAN,
    "completion bash": PLAN,
    "validate config/digits.yaml": PLAN,
    "validate config/digits.yaml --macs": PLAN,
    "validate config/paper-pixart-256.yaml --files": FILES,
    "forecast config/paper-osp.yaml --gpus 8": FILES,
    "list suites": FILES,
    "audit --out audit.md": PAGE,
    "claims published": RESULTS,
    "export published": RESULTS,
    f"verdicts {ON_DIGITS}": RESULTS,
    f"tables {ON_DIGITS}": RESULTS,
    f"diagnostics {ON_DIGITS}": RESULTS,
    f"ablations {ON_DIGITS}": RESULTS,
    f"report {ON_DIGITS}": FIGURES,  # draws the one that lacks
    "figures config/digits.yaml fig9a_cache_ratio --results published/digits": FIGURES,
}
"""What each command may import of the package's dependencies. One process runs them in this order, so later ones may
import what earlier ones did, and a module is named where it first appears."""
DRAWN = "fig9b_allocation"
FAILS = {"--like no_such_method": 2, "--files": 1, "--row nfe20-fora": 1}  # nothing is near; all else succeeds

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


def run(commands: Iterable[str], folder: Path, code: str = RUN) -> list[Done]:
    """Run commands in a folder, where nothing was trained."""
    arguments = [sys.executable, "-c", code, json.dumps([*commands])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=True)
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
    folder = tmp_path_factory.mktemp("quick")
    digits = folder / "published/digits"
    shutil.copytree(ROOT / "results/reference/digits", digits)
    for name in figure_names(load_suite(ROOT / "config/digits.yaml")):
        if name != DRAWN:  # what draws one draws all, two seconds each
            with sealed(digits / f"figures/{name}.svg", picture_of("digits", name)) as path:
                path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "config").symlink_to(ROOT / "config")
    return dict(zip(COMMANDS, run(COMMANDS, folder), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_imports(command: str, after: dict[str, Done]) -> None:
    assert after[command].imported <= COMMANDS[command]
    assert after[command].status == next((status for end, status in FAILS.items() if command.endswith(end)), 0)


def test_the_lists_have_eyes(after: dict[str, Done], tmp_path: Path) -> None:
    """Otherwise they would hold whatever was imported."""
    first, *_, last = after.values()
    assert first.imported == CONFIG and last.imported == FIGURES
    assert {"torch", "diffusers", "transformers", "scipy", "matplotlib", "PIL"} <= dependencies()
    with_torch = RUN.replace("main(command.split())", "__import__('torch') and 0")
    assert "torch" in run(["methods"], tmp_path, with_torch)[0].imported
