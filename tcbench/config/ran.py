"""What was run of a suite whose run was cut short: a suite of its own, which says in every title what it lacks.

Imports no torch.
"""

from collections.abc import Sequence

from tcbench.config.fields import Ablation, Rivals
from tcbench.config.preview import of_rows, scored_rows, with_needed
from tcbench.config.suite import BASELINE, RIVALS, TRAININGS, AblationSuite, Suite, rival_rows


def as_run(suite: Suite) -> tuple[Suite, tuple[str, ...]]:
    """The rows, variants and rivals of a suite that are scored, and the names of those that are not.

    A row without what it is compared with or samples with was not run, either; further trainings count where a row
    has all of them.

    Raises:
        UserError: no row is scored.
    """
    rows = scored_rows(suite, tuple(suite.rows))
    ablations, missing = _ablations(suite, rows)
    trained_again, of, untrained = _trained_again(suite, rows)
    rivals, not_run = _rivals(suite, rows)
    lacks = (*(name for name in suite.rows if name not in rows), *missing, *untrained, *not_run)
    differs = [suite.about.differs, f"run in part, {len(lacks)} rows and variants lack" if lacks else ""]
    run = {
        "about": suite.about.model_copy(update={"differs": "; ".join(filter(None, differs))}),
        "ablations": ablations | trained_again,
        "trainings": suite.trainings if trained_again else 1,
        "trainings_of": of,
        "rivals": rivals,
    }
    fewer = of_rows(suite, rows).model_copy(update=run)
    return Suite.model_validate(fewer.model_dump(mode="json", by_alias=True)), lacks


def _scored(part: AblationSuite, names: Sequence[str]) -> bool:
    """Whether variants are scored, with what the ablation samples for them alone."""
    return all(part[name].scores.exists() for name in with_needed(part, names) if name in part.own)


def _ablations(suite: Suite, rows: Sequence[str]) -> tuple[dict[str, Ablation], list[str]]:
    """The ablations with the variants that are scored, and the names of those that are not."""
    found: dict[str, Ablation] = {}
    missing: list[str] = []
    for name, ablation in suite.ablations.items():
        if name == TRAININGS:
            continue
        part, there = suite.ablation_suites[name], {}
        for key, variant in ablation.rows.items():
            scales = [f"-cfg{scale:g}" for scale in ablation.guidance_scales] or [""]
            own = [f"{name}-{key}{at}" for at in scales]
            needed = {variant.base or ablation.base, *(row for row in with_needed(part, own) if row in suite.rows)}
            if needed <= {*rows} and _scored(part, own):
                there[key] = variant
            else:
                missing += own
        if there:
            found[name] = ablation.model_copy(update={"rows": there})
    return found, missing


def _trained_again(suite: Suite, rows: Sequence[str]) -> tuple[dict[str, Ablation], tuple[str, ...], list[str]]:
    """The ablation of further trainings with the rows that have all of them, if all that share a training have; what
    these share, for `trainings_of`; and the names that lack."""
    if not suite.repeats:
        return {}, suite.trainings_of, []
    part, ablation = suite.ablation_suites[TRAININGS], suite.ablations[TRAININGS]
    source_of = {name: source.name for name in suite.repeats if (source := suite[name].training_source)}
    cut = {source_of[name] for name, again in suite.repeats.items() if name not in rows or not _scored(part, again)}
    missing = [again for name in suite.repeats if source_of[name] in cut for again in suite.repeats[name]]
    if not missing:
        return {TRAININGS: ablation}, suite.trainings_of, []
    kept = {key: row for key, row in ablation.rows.items() if source_of[row.base] not in cut}
    if not kept:
        return {}, (), missing
    left = ablation.model_copy(update={"rows": kept, "base": next(iter(kept.values())).base})
    return {TRAININGS: left}, tuple(dict.fromkeys(source_of[row.base] for row in kept.values())), missing


def _rivals(suite: Suite, rows: Sequence[str]) -> tuple[Rivals | None, list[str]]:
    """The rivals that were run, if what they are compared with was, and the names of those that were not."""
    if suite.rivals is None or suite.rival_suite is None:
        return None, []
    started_from = rival_rows(suite, suite.rivals).rows
    there = []
    for name, method in suite.rivals.contenders.items():
        asked = started_from[name]
        needed = {getattr(asked, field) for field in ("base", "artefacts_from") if field in asked.model_fields_set}
        scored = suite.rival_record(name).exists() and needed - {None} <= {*rows, f"{RIVALS}-{method}"}
        if scored and (name == method or method in there):
            there.append(name)
    if BASELINE not in there or not suite.rival_record("uncached").exists():
        there = []
    missing = [f"{RIVALS}-{name}" for name in suite.rivals.contenders if name not in there]
    plain = [method for name, method in suite.rivals.contenders.items() if name != method and name in there]
    run = {
        "methods": {name: tried for name, tried in suite.rivals.methods.items() if name in there},
        "anew": {name: options for name, options in suite.rivals.anew.items() if name in there},
        "without_refiners": tuple(plain),
    }
    return (suite.rivals.model_copy(update=run) if there else None), missing
