"""Which source files a stage's results depend on, for the workflow's rules and for the samples' fingerprints.

Read from the imports, so that none is forgotten: a stage depends on its modules and on all that these import, but not
on what cannot change a number, so that editing an error message or a table does not retrain anything.
"""

from functools import cache, lru_cache
from pathlib import Path

from tcbench.outside.places import data_file, method_file
from tcbench.record.files import digest, sha256
from tcbench.record.imports import closure, module_file, modules_loaded, with_packages

STAGES = {
    "encode": ("tcbench.stages.encode",),
    "train": ("tcbench.stages.train",),
    "search": ("tcbench.stages.search",),
    "sample": ("tcbench.stages.sample",),
    "score": ("tcbench.stages.score",),
    "ablate": ("tcbench.stages.sample", "tcbench.stages.score"),
    "rivals": ("tcbench.stages.rivals",),
    "vbench": ("tcbench.stages.vbench", "tcbench.stages.vbench_process"),
    "bench": ("tcbench.stages.bench",),
    "latency": ("tcbench.stages.latency",),
    "diagnose": ("tcbench.stages.diagnose",),
    "report": ("tcbench.stages.render",),
    "speed": ("tcbench.report.speed",),
}
"""The modules that run each stage, whatever imports them."""

CANNOT_CHANGE_NUMBERS = frozenset(
    {
        "tcbench",  # its version
        # what a config says reaches fingerprints and rules as values
        *(
            f"tcbench.config.{name}"
            for name in ("document", "fields", "depends", "suite", "load", "check", "speed", "needs")
        ),
        *("tcbench.budget.borrowing", "tcbench.errors"),  # these refuse
        *(f"tcbench.watch.{name}" for name in ("checking", "guard", "surroundings", "undisturbed")),
        # these find
        *("tcbench.outside.devices", "tcbench.outside.places", "tcbench.registry", "tcbench.stages.device"),
        *(f"tcbench.record.{name}" for name in ("files", "identity", "imports", "provenance", "sources", "spent")),
    }
)
"""What every stage imports and none depends on, nor on what it is imported for by these alone."""


def source_modules(stage: str, *methods: str, data: str | None = None) -> set[str]:
    """The package's modules that a stage's results depend on, with those that the methods and the data set import.

    A data set is found by its file, and no module names it, so a stage depends on that of its own suite alone.
    """
    found = [*map(method_file, methods), *([data_file(data)] if data else [])]
    vocabulary = {module for path in found for module in _loaded_by(path)}
    return closure(with_packages(STAGES[stage]) | vocabulary, without=CANNOT_CHANGE_NUMBERS)


def source_files(stage: str, *methods: str, data: str | None = None) -> list[Path]:
    """The files of `source_modules`, by the modules' names, and those of the methods and of the data set involved."""
    modules = [module_file(module) for module in sorted(source_modules(stage, *methods, data=data))]
    named = [*map(method_file, methods), *([data_file(data)] if data else [])]
    return list(dict.fromkeys([*filter(None, modules), *named]))


@lru_cache
def source_digest(stage: str, *methods: str, data: str | None = None) -> str:
    """Identifies the code of a stage, of the methods and of the data set involved by content alone, wherever it lies.

    Rules have this as a parameter, not the files as inputs, so that a moved checkout runs nothing again.
    """
    return digest([_content(path) for path in source_files(stage, *methods, data=data)])


# A workflow asks for the digests of a hundred jobs, which have most files in common.
_content, _loaded_by = cache(sha256), cache(modules_loaded)
