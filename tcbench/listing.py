"""What there is, by name: suites, models, methods, metrics, the tables of suites. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import Any

from tcbench.config.load import load_suite
from tcbench.config.speed import is_speed_config, load_speed_suite
from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.models.specs import MODELS
from tcbench.outside.places import SHIPPED, method_file, suite_file, suite_files
from tcbench.registry import documentation, method_class, method_names

Entries = dict[str, dict[str, Any]]
"""By name; each has a line for people, `says`, and what programs ask for beside it."""


def _suites() -> Entries:
    """A suite that cannot be read says why."""
    found: Entries = {}
    for name in sorted(suite_files()):
        try:
            path = suite_file(name)
            if is_speed_config(path):
                found[name] = {"says": load_speed_suite(path).description, "file": str(path), "kind": "speed"}
            else:
                suite = load_suite(path)
                about = {"rows": [*suite.rows], "model": suite.model.name, "device": suite.model.device}
                found[name] = {"says": suite.about.description, "file": str(path), "kind": "samples", **about}
        except UserError as error:
            found[name] = {"says": f"broken: {error}", "broken": str(error)}
    return found


def _models() -> Entries:
    return {
        name: {
            "says": f"{spec.family}, {spec.num_blocks} blocks of width {spec.width}, latents "
            f"{'×'.join(map(str, spec.latent_shape))}" + (", with weights" if spec.weights else ""),
            "spec": spec.model_dump(mode="json"),
        }
        for name, spec in MODELS.items()
    }


def methods_listed(names: Sequence[str] | None = None) -> Entries:
    """Methods with their options; one that does not load says why, unless it was asked for by name.

    Raises:
        UserError: a method of `names` is unknown or broken.
    """
    found: Entries = {}
    for name in names or method_names():
        try:
            cls, file = method_class(name), method_file(name)
        except UserError as error:
            if names:
                raise
            found[name] = {"says": f"broken: {error}", "broken": str(error)}
            continue
        about = documentation(cls)
        found[cls.name] = {
            "says": ": ".join([cls.label, *about.strip().splitlines()[:1]]),
            "label": cls.label,
            "about": about,
            "knob": cls.knob,
            "trains": cls.trains,
            "decides": cls.decides,
            "options": {
                option: None if info.is_required() else info.default for option, info in cls.model_fields.items()
            },
            "required": [option for option, info in cls.model_fields.items() if info.is_required()],
            "file": str(file),
            "ships": file.is_relative_to(SHIPPED),
        }
    return found


def _metrics() -> Entries:
    return {
        name: {
            "says": f"{metric.label}: {metric.better} is better; of {', '.join(sorted(metric.needs))}",
            "label": metric.label,
            "better": metric.better,
            "needs": sorted(metric.needs),
        }
        for name, metric in METRICS.items()
    }


def _tables() -> Entries:
    """By suite and file name; what a speed suite renders is not among them."""
    found: Entries = {}
    for name in sorted(suite_files()):
        path = suite_file(name)
        if is_speed_config(path):
            continue
        suite = load_suite(path)
        titles = {name: table.title for name, table in suite.tables.items()}
        titles |= {"table1": "Table I"} if suite.adaptive_rows else {}
        titles |= {"local_error": "One-step local errors"} if suite.predictor_rows else {}
        titles |= {f"ablation-{name}": ablation.title for name, ablation in suite.ablations.items()}
        titles["verdicts"] = "Verdicts on the paper's claims"
        for table, title in titles.items():
            found[f"{name}/{table}"] = {"says": title, "file": str(suite.folder / "tables" / f"{table}.md")}
    return found


LISTS: dict[str, Callable[[], Entries]] = {
    "suites": _suites,
    "models": _models,
    "methods": methods_listed,
    "metrics": _metrics,
    "tables": _tables,
}


def listed(what: str) -> Entries:
    """Everything of a kind, one of `LISTS`."""
    return LISTS[what]()
