"""What a stage depends on is a set of groups of the config: no field is forgotten, none counts where it must not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tcbench.config.depends import STAGES
from tcbench.config.fields import Images, Latents, PaperModel, Row, SampledRow, TrainedRow
from tcbench.config.load import load_suite
from tcbench.config.page import PAGE, page
from tcbench.config.suite import Suite
from tcbench.record import sources
from tests.suites import altered

SMOKE = Path(__file__).parent / "smoke.yaml"

IN_ROWS = {"defaults", "rows", "ablations", "trainings", "trainings_of"}
"""Fields of the suite whose content reaches stages as rows."""
OF_NO_STAGE = {"suite", "about", "show", "jobs", "files"}
"""Fields of the suite that name, describe, show and schedule: only what is rendered depends on them."""
OPTIONAL = {
    "about.stands_for": PaperModel(name="DiT", resolution=256),
    "model.latents": Latents(kind="sd", folder="vae"),
    "training.images": Images(folder="images"),
}
"""What a suite may lack."""
WHOLE = altered(load_suite(SMOKE), OPTIONAL)


def leaves(model: BaseModel, *path: str) -> Iterator[tuple[str, ...]]:
    """The places of a config's values: fields that hold no group."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, *path, name)
        else:
            yield *path, name


def other(model: BaseModel, path: tuple[str, ...]) -> BaseModel:
    """The same with another value there, which need not be valid: the test is whether it counts."""
    name, *inner = path
    value = other(getattr(model, name), tuple(inner)) if inner else "another value"
    return model.model_copy(update={name: value})


def test_every_field_of_a_suite_is_in_one_group() -> None:
    in_stages = set().union(*(depends.groups for depends in STAGES.values()))
    kinds = [in_stages, IN_ROWS, OF_NO_STAGE | {"training_gpus"}]  # it is in the key of a training that has several
    assert set().union(*kinds) == Suite.model_fields.keys()
    assert sum(map(len, kinds)) == len(Suite.model_fields)
    assert STAGES.keys() == sources.STAGES.keys() - {"report", "bench", "speed"}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("path", [path for path in leaves(WHOLE) if path[0] not in IN_ROWS], ids=".".join)
def test_a_value_counts_where_its_group_does(path: tuple[str, ...]) -> None:
    def settings(suite: BaseModel, stage: str) -> str:
        groups = suite.model_dump(mode="json", include=set(STAGES[stage].groups))
        return json.dumps(groups, sort_keys=True)

    # `files_of_data` aside, which are not there, this is what a suite says it depends on
    assert all(Suite.settings(WHOLE, stage).items() >= json.loads(settings(WHOLE, stage)).items() for stage in STAGES)
    changed = other(WHOLE, path)
    counts = {stage for stage in STAGES if settings(changed, stage) != settings(WHOLE, stage)}
    assert counts == {stage for stage, depends in STAGES.items() if path[0] in depends.groups}
    assert changed.digest() != WHOLE.digest()  # type: ignore[attr-defined]


ROW_PARTS = {"train": TrainedRow, "sample": SampledRow, "score": Row}
CHANGES = {
    "method": "fora",
    "nfe": 3,
    "options": {"num_full_steps": 3},
    "training_seed": 1,
    "artefacts_from": "nfe4-other",
    "guidance_scale": 2.0,
    "refiners": False,
    "full_steps_of": "nfe4-other",
    "searched": True,
    "label": "another",
    "control": True,
    "target": "nfe4-fora",
    "paper": {"fid": 1.0},
}


def test_every_field_of_a_row_is_tried() -> None:
    assert CHANGES.keys() == Row.model_fields.keys()
    assert [STAGES[stage].row for stage in ROW_PARTS] == list(ROW_PARTS.values())


@pytest.mark.parametrize("field", CHANGES)
def test_a_rows_value_counts_from_the_stage_that_reads_it(field: str) -> None:
    row = WHOLE.rows["nfe4-tokencache"]
    if field == "method":
        row = row.model_copy(update={"options": {}})  # those of another method
    other_trained = row.model_copy(update={"options": row.options | {"beta": -20}})
    before = altered(WHOLE, {"rows": WHOLE.rows | {"row": row, "nfe4-other": other_trained}})
    changed = Row.model_validate(row.model_dump(by_alias=True) | {field: CHANGES[field]})
    after = altered(before, {"rows": before.rows | {"row": changed}})
    counts = {stage for stage in ROW_PARTS if before["row"].settings(stage) != after["row"].settings(stage)}
    assert counts == {stage for stage, part in ROW_PARTS.items() if field in part.model_fields}


def test_the_page_of_all_keys_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tcbench.config.page`"
    assert "|  |\n" not in page(), "a field lacks its description"


def test_samples_and_scores_depend_on_what_is_trained_for_them() -> None:
    after = altered(WHOLE, {"training.seed": 1})
    for stage in ("sample", "latency", "score", "ablate"):
        changed = {row for row in WHOLE.rows if WHOLE[row].settings(stage) != after[row].settings(stage)}
        assert changed == {entry.name for entry in WHOLE.entries if entry.trained_as}, stage
