"""Rows that sample with what was trained for another row: whether they may, from shapes and options alone."""

from tcbench.config import Suite
from tcbench.costing import run_of_shapes
from tcbench.errors import UserError


def check_borrowing(suite: Suite) -> None:
    """`check_training` of all rows, those of ablations too."""
    for part in (suite, *suite.ablation_suites.values()):
        for row in part.rows:
            check_training(part, row)


def check_training(suite: Suite, row: str) -> None:
    """A row that borrows artefacts must not change what they were trained with.

    Raises:
        UserError: it changes an option that its method reads in training.
    """
    source = suite.trained_row(row)
    if source in (None, row):
        return
    method, trained = suite.method(row), suite.method(source)
    run = run_of_shapes(suite.model, suite.rows[source].nfe)
    if type(method) is type(trained) and method.training(run) != trained.training(run):
        raise UserError(
            f"row {row}: its options change what {source} was trained with; "
            "set `artefacts_from: null` so that it trains its own"
        )
