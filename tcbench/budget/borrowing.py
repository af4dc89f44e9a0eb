"""Rows that sample with what was trained: whether they may, from shapes, options and the record of the training."""

from collections.abc import Mapping, Sequence
from typing import Any

from tcbench.budget.costing import run_of_shapes
from tcbench.config.suite import RIVALS, Entry, Suite
from tcbench.errors import UserError
from tcbench.method import Artefacts, refuse_lacking
from tcbench.record.records import TRAINED, Trained
from tcbench.registry import make_method
from tcbench.trainable import Trainable, TrainRefiners, described


def check_borrowing(suite: Suite) -> None:
    """`check_training` of all rows, those of ablations too.

    Raises:
        UserError: a line for every row that may not.
    """
    problems = []
    for part in (suite, *suite.ablation_suites.values()):
        for entry in part.entries:
            try:
                check_training(entry)
            except UserError as error:
                problems.append(str(error))
    problems += _rivals_that_train_otherwise(suite)
    if problems:
        raise UserError("\n".join(problems))


def _rivals_that_train_otherwise(suite: Suite) -> list[str]:
    """Methods of the table of rivals whose values to try are read in training: nothing is trained between trials."""
    problems: list[str] = []
    part, rivals = suite.rival_suite, suite.rivals
    if part is None or rivals is None:
        return problems
    for method, tried in rivals.methods.items():
        source = part[f"{RIVALS}-{method}"].trained_as
        if source is None or source.method.name != method:
            continue
        run = run_of_shapes(source.suite.model.name, source.nfe)
        stages = source.method.training(run)
        given = source.method.model_dump()
        problems += [
            f"rivals.methods.{method}.{option}: changes what {source.name} was trained with; "
            "name it under `rivals.anew`, which trains once more"
            for option, values in tried.items()
            if any(make_method(method, given | {option: value}).training(run) != stages for value in values)
        ]
    return problems


def check_training(entry: Entry) -> None:
    """A row must have what its method needs; if it borrows that, it must not change what it was trained with, nor leave
    out what is not among it.

    Raises:
        UserError: nothing makes what its method needs, it changes an option that its method reads in training, its
            `refiners` are not trained, or the model is too small for its options.
    """
    method, source = entry.method, entry.trained_as
    if source is None:
        refuse_lacking(method, Artefacts(), f"row {entry.name}")
        return
    trained = source.method
    run = run_of_shapes(entry.suite.model.name, source.nfe)
    try:
        stages = trained.training(run)
    except UserError as error:
        raise UserError(f"row {entry.name}: {error}") from error
    made = {stage.name: () for stage in stages if not isinstance(stage, TrainRefiners)}
    refuse_lacking(method, Artefacts(tables=made), f"row {entry.name}")
    if entry.row.refiners is not True and not any(isinstance(stage, TrainRefiners) for stage in stages):
        raise UserError(f"row {entry.name}: refiners: {source.name} trains none; remove the field")
    if entry.trains:
        return
    if type(method) is type(trained) and method.training(run) != stages:
        raise UserError(
            f"row {entry.name}: its options change what {source.name} was trained with; "
            "set `artefacts_from: null` so that it trains its own"
        )


def training_record(entry: Entry) -> Trained | None:
    """What is on record of the training that a row samples with; None where there is none.

    Raises:
        UserError: it is missing, damaged or another row's, or was trained otherwise than the config says by now.
    """
    if (source := entry.trained_as) is None:
        return None
    path = source.trained / "artefacts.json"
    log = TRAINED.read(path, source.name, source.suite.suite)
    if (said := log.get("settings")) is None:
        return log
    stages = source.method.training(run_of_shapes(source.suite.model.name, source.nfe))
    recorded, wanted = _circumstances(said), _circumstances(source.training_settings)
    differing = [what for what, value in wanted.items() if recorded[what] != value]
    differing += [] if [described(stage) for stage in stages] == _declared(log, stages) else ["options"]
    if differing:
        raise UserError(
            f"{path}: was trained with other settings than the config has ({', '.join(differing)}); "
            f"run `tcbench train` for {source.name} again"
        )
    return log


def _circumstances(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a training was one of, besides the stages that its method declares."""
    seed = settings.get("training_seed")
    own = settings.get("training", {}).get("seed") if seed is None else seed
    return {"method": settings.get("method"), "nfe": settings.get("nfe"), "seed": own}


def _declared(log: Trained, stages: Sequence[Trainable]) -> list[dict[str, Any]]:
    """Of every recorded stage what a method declares of such a one."""
    if len(log["stages"]) != len(stages):
        return []
    return [
        {field: value for field, value in said.items() if field in described(stage)}
        for said, stage in zip(log["stages"], stages, strict=True)
    ]
