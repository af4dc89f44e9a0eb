"""Rows that sample with what was trained: whether they may, from shapes and options alone."""

from tcbench.budget.costing import run_of_shapes
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError
from tcbench.trainable import TrainRefiners


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
    if problems:
        raise UserError("\n".join(problems))


def check_training(entry: Entry) -> None:
    """A row that borrows artefacts must not change what they were trained with, nor leave out what is not among them.

    Raises:
        UserError: it changes an option that its method reads in training, its `refiners` are not trained, or the model
            is too small for its options.
    """
    source = entry.trained_as
    if source is None:
        return
    method, trained = entry.method, source.method
    run = run_of_shapes(entry.suite.model.name, source.nfe)
    try:
        stages = trained.training(run)
    except UserError as error:
        raise UserError(f"row {entry.name}: {error}") from error
    if entry.row.refiners is not True and not any(isinstance(stage, TrainRefiners) for stage in stages):
        raise UserError(f"row {entry.name}: refiners: {source.name} trains none; remove the field")
    if entry.trains:
        return
    if type(method) is type(trained) and method.training(run) != stages:
        raise UserError(
            f"row {entry.name}: its options change what {source.name} was trained with; "
            "set `artefacts_from: null` so that it trains its own"
        )
