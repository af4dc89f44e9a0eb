"""What was run of a suite whose run was cut short: a suite of its own, which says in every title what it lacks.

Imports no torch.
"""

from typing import Any

from tcbench.config.fields import Ablation, Rivals
from tcbench.config.preview import of_rows, with_needed
from tcbench.config.suite import BASELINE, RIVALS, TRAININGS, AblationSuite, Suite, rival_rows
from tcbench.errors import UserError


def as_run(suite: Suite) -> tuple[Suite, tuple[str, ...]]:
    """The rows, variants and rivals of a suite that are scored, and the names of those that are not.

    A row without what it is compared with or samples with was not run, either; further trainings count where a row
    has all of them.

    Raises:
        UserError: no row is scored.
    """
    rows = tuple(name for name in suite.rows if _scored(suite, with_needed(suite, [name])))
    if not rows:
        raise UserError(f"{suite.folder}: no row is scored beside its reference row; run `tcbench run {suite.suite}`")
    lacks = [name for name in suite.rows if name not in rows]
    ablations: dict[str, Ablation] = {}
    for name, ablation in suite.ablations.items():
        if name != TRAININGS:
            there, missing = _variants(suite, rows, suite.ablation_suites[name], ablation)
            lacks += missing
            if there:
                ablations[name] = ablation.model_copy(update={"rows": there})
    trainings: dict[str, Any] = {}
    if TRAININGS in suite.ablations:
        repeated, missing = _trained_again(suite, rows)
        lacks += missing
        if repeated:
            ablation = suite.ablations[TRAININGS]
            again = {key: row for key, row in ablation.rows.items() if row.base in repeated}
            ablations[TRAININGS] = ablation.model_copy(update={"rows": again, "base": next(iter(again.values())).base})
            sources = dict.fromkeys(source.name for name in repeated if (source := suite[name].training_source))
            of = tuple(sources) if missing else suite.trainings_of
            trainings = {"trainings": suite.trainings, "trainings_of": of}
    rivals, missing = _rivals(suite, rows)
    lacks += missing
    about = suite.about
    if lacks:
        said = f"run in part, {len(lacks)} rows and variants lack"
        about = about.model_copy(update={"differs": "; ".join(filter(None, [about.differs, said]))})
    fewer = of_rows(suite, rows)
    fewer = fewer.model_copy(update={"about": about, "ablations": ablations, "rivals": rivals, **trainings})
    return Suite.model_validate(fewer.model_dump(mode="json", by_alias=True)), tuple(lacks)


def _scored(suite: Suite, names: tuple[str, ...]) -> bool:
    return all(suite[name].scores.exists() for name in names)


def _variants(
    suite: Suite, rows: tuple[str, ...], part: AblationSuite, ablation: Ablation
) -> tuple[dict[str, Any], list[str]]:
    """The variants of an ablation that are scored, by their keys, and the names of those that are not."""
    there, missing = {}, []
    for key, variant in ablation.rows.items():
        scales = ablation.guidance_scales or (None,)
        names = [f"{part.ablation}-{key}" + ("" if scale is None else f"-cfg{scale:g}") for scale in scales]
        needed = with_needed(part, names)
        base = getattr(variant, "base", None) or ablation.base
        own = tuple(name for name in needed if name in part.own)
        if base in rows and all(name in rows for name in needed if name in suite.rows) and _scored(part, own):
            there[key] = variant
        else:
            missing += names
    return there, missing


def _trained_again(suite: Suite, rows: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The rows with all their further trainings, if all that share a training have them; and the names that lack."""
    part = suite.ablation_suites[TRAININGS]
    whole = {name: name in rows and _scored(part, repeats) for name, repeats in suite.repeats.items()}
    source_of = {name: source.name for name in whole if (source := suite[name].training_source)}
    cut = {source_of[name] for name, there in whole.items() if not there}
    missing = [repeat for name, repeats in suite.repeats.items() if source_of[name] in cut for repeat in repeats]
    return [name for name in whole if source_of[name] not in cut], missing


def _rivals(suite: Suite, rows: tuple[str, ...]) -> tuple[Rivals | None, list[str]]:
    """The rivals that were run, if what they are compared with was, and the names of those that were not."""
    if suite.rivals is None or suite.rival_suite is None:
        return None, []
    started_from = rival_rows(suite, suite.rivals).rows
    there = {}
    for name, tried in suite.rivals.methods.items():
        asked = started_from[name]
        needed = {getattr(asked, field) for field in ("base", "artefacts_from") if field in asked.model_fields_set}
        if suite.rival_record(name).exists() and needed - {None} <= {*rows}:
            there[name] = tried
    if BASELINE not in there or not suite.rival_record("uncached").exists():
        there = {}
    missing = [f"{RIVALS}-{name}" for name in suite.rivals.methods if name not in there]
    anew = {name: options for name, options in suite.rivals.anew.items() if name in there}
    return (suite.rivals.model_copy(update={"methods": there, "anew": anew}) if there else None), missing
