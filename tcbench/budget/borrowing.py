"""Rows that sample with what was trained for another row: whether they may, from shapes and options alone."""

from tcbench.budget.costing import run_of_shapes
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError


def check_borrowing(suite: Suite) -> None:
    """`check_training` of all rows, those of ablations too."""
    for part in (suite, *suite.ablation_suites.values()):
        for entry in part.entries:
            check_training(entry)


def check_training(entry: Entry) -> None:
    """A row that borrows artefacts must not change what they were trained with.

    Raises:
        UserError: it changes an option that its method reads in training.
    """
    source = entry.trained_as
    if source is None or entry.trains:
        return
    method, trained = entry.method, source.method
    run = run_of_shapes(entry.suite.model.name, source.nfe)
    if type(method) is type(trained) and method.training(run) != trained.training(run):
        raise UserError(
            f"row {entry.name}: its options change what {source.name} was trained with; "
            "set `artefacts_from: null` so that it trains its own"
        )
