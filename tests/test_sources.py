"""Which source files a stage's numbers depend on: none that it runs is forgotten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tcbench.config import depends
from tcbench.metrics.catalogue import METRICS
from tcbench.models.networks import FAMILIES
from tcbench.record.imports import closure, imported_names, module_file, modules_loaded
from tcbench.record.sources import CANNOT_CHANGE_NUMBERS, STAGES, source_files, source_modules
from tcbench.registry import data_names, method_names
from tests import official
from tests.suites import with_fields
from tests.test_depends import IN_ROWS

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent

SHARED = {
    "suite": "mini",
    "about": {"description": "every kind of training and data", "differs": "a test", "guidance_rule": "any"},
    "model": {"weights": "random"},
    "sampler": {"guidance_scale": 1.5},
    "samples": {"count": 8, "batch_size": 4},
    "show": {"figure": {"nfe": 3}},
}
PLAIN = {"method": "uncached", "nfe": 3}
ROUTER = {"method": "learning_to_cache", "nfe": 3, "options": {"iterations": 1, "batch_size": 2}}
SEARCHED = {"method": "fora", "nfe": 3, "searched": True, "options": {"num_full_steps": 2}}
SUITES = {
    "digits": {
        "model.name": "digits-dit",
        "data.name": "digits",
        "scoring.extractor": "digits-cnn",
        "search": {"samples": 1, "trials": 1},
        "rows": {"plain": PLAIN, "searched": SEARCHED},
    },
    "images": {
        "model.name": "tiny-dit",
        "model.latents": {"kind": "sd", "folder": "autoencoder"},
        "data.name": "imagenet",
        "training.images.folder": "images",
        "scoring.metrics": ["mae"],
        "show.tables": {},
        "rows": {"plain": PLAIN, "router": ROUTER},
    },
}
CAPTIONED = str(TESTS / "captioned_smoke.yaml")
SPEED = f"--config {TESTS / 'speed_smoke.yaml'} --model tiny-dit --dtype bf16"
COMMANDS = [
    ("sample", "sample digits.yaml --rows plain"),
    ("score", "score digits.yaml --rows plain"),
    ("search", "search digits.yaml --row searched"),
    ("encode", "encode images.yaml"),
    ("train", "train images.yaml --row router"),
    ("sample", "sample images.yaml --rows plain router"),
    ("score", "score images.yaml --rows router"),
    ("train", f"train {CAPTIONED} --row nfe3-tokencache"),
    ("sample", f"sample {CAPTIONED} --rows nfe3-uncached nfe3-tokencache nfe3-plain"),
    ("score", f"score {CAPTIONED} --rows nfe3-uncached nfe3-tokencache nfe3-plain"),
    ("latency", f"latency {CAPTIONED}"),
    ("report", f"report {CAPTIONED}"),
    ("bench speed", f"bench {SPEED}"),
]
"""Small runs of the stages, in an order in which each finds what it needs."""

DATA = ("digits", "imagenet", "moving")
"""What the suites of these runs are of."""

RUN = """
import gc, json, os, sys
from importlib import import_module

SLOW = "torch diffusers.models.transformers.transformer_2d diffusers.hooks torch_fidelity peft scipy.special pandas"
apart, commands = json.loads(sys.argv[1])
for module in [*SLOW.split(), *apart]:  # once, not in each process
    import_module(module)
gc.freeze()  # as in tcbench/outside/warm.py
before = set(sys.modules)
for command in commands:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, command
        continue
    from tcbench import cli
    from tcbench.config.suite import Suite
    from tcbench.models.specs import MODELS

    read, load = set(), cli.load_suite
    def loaded_suite(path, *asked):  # from here on the stage reads, and the config's checks no more
        suite, plain = load(path), Suite.__getattribute__
        Suite.__getattribute__ = lambda self, name: (read.add(name), plain(self, name))[1]
        return suite
    cli.load_suite = loaded_suite
    MODELS["moving-osp"] = MODELS["moving-osp"].model_copy(update={"num_blocks": 4, "dense_blocks": (0, 3)})
    status = cli.main(command.split())
    loaded = sorted(name for name in set(sys.modules) - before if name.startswith("tcbench."))
    with open("loaded.txt", "a", encoding="utf-8") as file:
        file.write(json.dumps([loaded, sorted(read.intersection(Suite.model_fields))]) + "\\n")
    os._exit(status)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[set[str], set[str]]]:
    """(the package's modules that each of `COMMANDS` loads, besides what `CANNOT_CHANGE_NUMBERS` brings along; the
    groups of the config that it reads).

    Each runs in a process of its own that begins where those modules, and the command line, are imported.
    """
    folder = tmp_path_factory.mktemp("sources")
    official.write_autoencoder(folder / "autoencoder")
    official.write_imagenet(folder / "images")
    for name, suite in SUITES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(with_fields(SHARED, suite)), encoding="utf-8")
    arguments = [[*sorted(CANNOT_CHANGE_NUMBERS), "tcbench.cli"], [command for _, command in COMMANDS]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    command = [sys.executable, "-c", RUN, json.dumps(arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (folder / "loaded.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(map(set, json.loads(line))) for line in lines]


@pytest.fixture(scope="module")
def loaded(runs: list[tuple[set[str], set[str]]]) -> list[set[str]]:
    """The modules of `runs`."""
    return [modules for modules, _ in runs]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[Path(command).name for _, command in COMMANDS])
def test_no_module_that_a_stage_loads_is_missing(number: int, loaded: list[set[str]]) -> None:
    stages, _ = COMMANDS[number]
    own = {"tcbench.data.sets"} | {f"tcbench.data.sets.{data}" for data in DATA}  # found by file: `source_files`
    methods = method_names()
    named = set().union(*(source_modules(stage, *methods, data=data) for stage in stages.split() for data in DATA))
    assert loaded[number] - named - own == set()
    assert loaded[number]


@pytest.mark.parametrize(
    "number",
    [number for number, (stage, _) in enumerate(COMMANDS) if stage in depends.STAGES],
    ids=lambda i: COMMANDS[i][1],
)
def test_no_group_that_a_stage_reads_is_missing(number: int, runs: list[tuple[set[str], set[str]]]) -> None:
    (stage, _), (_, read) = COMMANDS[number], runs[number]
    # the suite's name is that of its folder; a number of GPUs above 1 is in the key of what is trained
    assert read - IN_ROWS - {"suite", "training_gpus"} <= depends.STAGES[stage].groups
    assert "model" in read


def test_the_runs_have_eyes(loaded: list[set[str]]) -> None:
    """Every stage is run but VBench (it has an environment of its own), `ablate` (two others) and `diagnose` (slow)."""
    run = {stage for stages, _ in COMMANDS for stage in stages.split()}
    assert run == STAGES.keys() - {"vbench", "ablate", "diagnose", "rivals"}
    assert {"tcbench.models.dit", "tcbench.models.open_sora_plan", "tcbench.training.routers"} <= set().union(*loaded)


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "def f():\n    try:\n        import g\n    except ImportError:\n        import h\n"
        "match 1:\n    case 1:\n        import i\n",
        encoding="utf-8",
    )
    assert imported_names(path) == {"a.b", "c", "c.d", "e", "f", "g", "h", "i"}
    assert imported_names(path, run_time_only=True) == {"a.b", "c", "c.d", "f", "g", "h", "i"}
    path.write_text("from . import a", encoding="utf-8")
    with pytest.raises(ValueError, match="relative"):
        imported_names(path)


def test_names_of_modules_in_strings_count(tmp_path: Path) -> None:
    path = tmp_path / "case.py"
    path.write_text("LAZY = ['tcbench.metrics.clip', \"tcbench.data.images:Listing\", 'tcbench.no_module']")
    packages = {"tcbench", "tcbench.metrics", "tcbench.data"}
    assert modules_loaded(path) == packages | {"tcbench.metrics.clip", "tcbench.data.images"}


def test_a_closure_neither_names_nor_follows_what_it_is_without() -> None:
    assert "tcbench.config.suite" in closure({"tcbench.stages.render"}, frozenset())
    assert "tcbench.models.specs" in closure({"tcbench.stages.render"}, frozenset())
    config = frozenset({"tcbench.config.suite", "tcbench.config.fields"})
    assert not (config | {"tcbench.models.specs"}) & closure({"tcbench.stages.render"}, config)


@pytest.mark.parametrize("family", [name for name in FAMILIES.values() if name.startswith("tcbench.")])
def test_families_are_sources_although_they_are_imported_by_name(family: str) -> None:
    assert family in source_modules("sample")


@pytest.mark.parametrize("name", method_names())
def test_a_methods_file_and_vocabulary_are_sources(name: str) -> None:
    *_, file = source_files("sample", name)
    assert file.stem == name
    assert modules_loaded(file) - CANNOT_CHANGE_NUMBERS <= source_modules("sample", name)


def test_a_row_depends_on_the_vocabulary_of_its_own_method_alone() -> None:
    """So that another way to choose tokens leaves the samples of a method that chooses none."""
    assert "tcbench.choose" in source_modules("sample", "toca") - source_modules("sample", "fora")


@pytest.mark.parametrize("name", data_names())
def test_a_suite_depends_on_its_own_data_sets_file_alone(name: str) -> None:
    def sets(data: str | None) -> set[str]:
        return {path.stem for path in source_files("sample", data=data) if path.parent.name == "sets"} - {"__init__"}

    assert sets(name) - sets(None) == {name}
    assert sets(None) == set()


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_sources_although_they_are_imported_by_name(metric: str) -> None:
    assert METRICS[metric].load.split(":")[0] in source_modules("score")


def test_named_modules_exist() -> None:
    assert all(module_file(name) for name in [*CANNOT_CHANGE_NUMBERS, *sum(STAGES.values(), ())])
    assert set(map(module_file, source_modules("report"))) == set(source_files("report"))


def test_a_table_retrains_nothing() -> None:
    for stage in STAGES.keys() - {"report", "speed"}:
        assert not [module for module in source_modules(stage) if module.startswith("tcbench.report")]
    assert not {"tcbench.engine.engine", "tcbench.stages.ready"} & (source_modules("score") | source_modules("encode"))
