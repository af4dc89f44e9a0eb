"""Suite configs: every mistake is one line that names the file, the field and the fix, before anything runs."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcbench.budget.borrowing import check_training
from tcbench.config.load import load_suite
from tcbench.config.speed import is_speed_config
from tcbench.errors import UserError

CONFIGS = [
    path for path in sorted((Path(__file__).parent.parent / "config").glob("*.yaml")) if not is_speed_config(path)
]

VALID: dict[str, Any] = {
    "suite": "mini",
    "about": {"description": "four rows", "differs": "not the paper's", "guidance_rule": "fixed"},
    "model": {"name": "digits-dit"},
    "data": {"name": "digits"},
    "sampler": {"guidance_scale": 1.5},
    "samples": {"count": 48, "batch_size": 24},
    "scoring": {"extractor": "digits-cnn"},
    "show": {"figure": {"nfe": 20}},
    "defaults": {"tokencache": {"refiner_blocks": 2}, "no_tokens": {"refiner_blocks": 2, "schedule": "adaptive"}},
    "rows": {
        "plain": {"method": "uncached", "nfe": 20, "paper": {"fid": 3.51, "is": 222.8}},
        "fora": {"method": "fora", "nfe": 20, "options": {"num_full_steps": 12}},
        "ours": {"method": "tokencache", "nfe": 20, "options": {"num_full_steps": 9, "beta": -4000}},
        "none": {
            "method": "no_tokens",
            "nfe": 20,
            "artefacts_from": "ours",
            "options": {"num_full_steps": 9, "beta": -4000},
        },
    },
}


def written(folder: Path, config: Any) -> Path:
    path = folder / "mini.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def changed(path: str, value: Any) -> dict[str, Any]:
    """VALID with one field set; `...` removes it."""
    config = copy.deepcopy(VALID)
    *parents, last = path.split("/")
    inner = config
    for key in parents:
        inner = inner.setdefault(key, {})
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    suite = load_suite(path)
    assert suite.suite == path.stem
    for entry in suite.entries:
        assert entry.reference.row.method == "uncached"
        assert entry.reference.nfe == entry.nfe
        assert entry.sample_settings["options"] == entry.method.model_dump(mode="json")


def test_what_a_suite_answers(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path, VALID))
    assert suite["ours"].method.model_dump(include={"refiner_blocks", "num_full_steps", "cache_ratio"}) == {
        "refiner_blocks": 2,  # the suite's default
        "num_full_steps": 9,  # the row's own
        "cache_ratio": 0.9,  # the method's
    }
    assert suite.trained_rows == ("ours",)
    assert [entry.trained_as and entry.trained_as.name for entry in suite.entries] == [None, None, "ours", "ours"]
    assert suite.groups == {"uncached": ("plain",), "fora": ("fora",), "tokencache": ("ours",), "no_tokens": ("none",)}
    assert suite.scored_together == {"all": tuple(VALID["rows"])}
    by_nfe = load_suite(written(tmp_path, changed("jobs", "nfe")))
    assert by_nfe.groups == {"nfe20-untrained": ("plain", "fora"), "nfe20-trained": ("ours", "none")}
    by_row = load_suite(written(tmp_path, changed("jobs", "row")))
    assert by_row.groups == by_row.scored_together == {row: (row,) for row in VALID["rows"]}
    assert suite.rows["plain"].paper.model_dump(by_alias=True)["is"] == 222.8


def test_rows_depend_on_what_changes_their_samples(tmp_path: Path) -> None:
    """And on nothing else: a label or another row's option must not make samples again."""
    before = load_suite(written(tmp_path, VALID))
    for path, value, changes in (
        ("rows/fora/label", "FORA!", set()),
        ("rows/fora/options/num_full_steps", 11, {"fora"}),
        ("rows/ours/options/predictor_iterations", 7, {"ours", "none"}),
        ("defaults/no_tokens/refiner_blocks", 3, {"none"}),
        ("training/seed", 1, {"ours", "none"}),
        ("samples/seed", 1, {"plain", "fora", "ours", "none"}),
        ("scoring/metrics", ["fid", "sfid", "is", "precision", "recall"], set()),
    ):
        after = load_suite(written(tmp_path, changed(path, value)))
        assert {row for row in VALID["rows"] if after[row].sample_settings != before[row].sample_settings} == changes, (
            path
        )
        assert after.digest() != before.digest(), path


BAD = [
    # field, value, what the message must hold
    ("sampels", {}, ["sampels: unknown key", "did you mean 'samples'"]),
    ("rows/fora/optoins", {}, ["rows.fora.optoins: unknown key", "did you mean 'options'"]),
    ("rows/plain/paper/fidd", 1.0, ["rows.plain.paper.fidd: unknown key", "did you mean 'fid'"]),
    ("sampler/guidance_scala", 1.0, ["sampler.guidance_scala: unknown key", "did you mean 'guidance_scale'"]),
    ("latency/zzz", 1, ["latency.zzz: unknown key", "known: batch_size, warmup, repeats"]),
    ("model/name", ..., ["model.name: field required"]),
    ("samples/count", "many", ["samples.count: input should be a valid integer", "not 'many'"]),
    ("samples/count", 0, ["samples.count: input should be greater than 0", "not 0"]),
    ("model/name", "dit-xl", ["model.name: 'dit-xl' is unknown; did you mean 'dit-xl-2-"]),
    ("scoring/metrics", ["fid", "fvd"], ["scoring.metrics.1: 'fvd' is unknown; did you mean 'fid'"]),
    ("model/device", "tpu", ["model.device: input should be 'cpu' or 'cuda'", "not 'tpu'"]),
    ("suite", "My Suite", ["suite: string should match pattern", "not 'My Suite'"]),
    ("sampler/guidance_scale", -1, ["sampler.guidance_scale: input should be greater than or equal to 0", "not -1"]),
    ("rows", [1], ["rows: input should be a valid dictionary"]),
    ("rows/plain", None, ["rows.plain: input should be a valid dictionary"]),
    ("rows/fora/nfe", 1, ["rows.fora.nfe: input should be greater than or equal to 2", "not 1"]),
    ("rows/fora/nfe", 50, ["rows.fora: nothing to compare with; add a row with method: uncached and nfe: 50"]),
    ("rows/fora/method", "forra", ["rows.fora: method 'forra': no file forra.py", "did you mean 'fora'"]),
    ("rows/fora/method", "xyzzy", ["rows.fora: method 'xyzzy'", "known: ", "tokencache"]),
    ("defaults/forra", {}, ["defaults.forra: no such method", "fora"]),
    (
        "rows/fora/options/intervall",
        3,
        ["rows.fora: methods/fora.py: unknown option 'intervall'", "interval, num_full"],
    ),
    ("rows/fora/options/interval", 3, ["rows.fora: methods/fora.py: give either interval or num_full_steps"]),
    (
        "rows/ours/options/cache_ratio",
        1.5,
        ["rows.ours: methods/tokencache.py: cache_ratio: ", "less than or equal to 1"],
    ),
    (
        "rows/ours/options/keys",
        "stale",
        ["rows.ours: methods/tokencache.py: keys: ", "'cached', 'fresh' or 'recomputed'"],
    ),
    (
        "rows/fora/options/num_full_steps",
        21,
        ["rows.fora.options.num_full_steps: 21 full steps of 20; give 20 or fewer"],
    ),
    ("rows/none/artefacts_from", "plain", ["rows.none.artefacts_from: 'plain' is not a row that is trained"]),
    ("rows/none/artefacts_from", "theirs", ["rows.none.artefacts_from: 'theirs' is not a row that is trained"]),
    ("rows/none/artefacts_from", ..., ["rows.none.options.schedule: 'adaptive' needs artefacts_from; or set 'even'"]),
    ("rows/a b", {"method": "uncached", "nfe": 20}, ["rows.a b: use letters, digits"]),
    ("show/figure/nfe", 50, ["show.figure.nfe: no row has nfe 50"]),
    ("samples/batch_size", 25, ["samples.batch_size: an interval needs two shards or more; give 24 or less"]),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD, ids=[f"{field}={value}" for field, value, _ in BAD])
def test_mistakes_are_explained(tmp_path: Path, field: str, value: Any, says: list[str]) -> None:
    path = written(tmp_path, changed(field, value))
    with pytest.raises(UserError) as caught:
        load_suite(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(part in message for part in says), message


def test_mistakes_in_a_later_row_are_its_own(tmp_path: Path) -> None:
    """`none` refers to `ours`, and here comes before it."""
    config = changed("rows/ours/options/cache_ratio", 1.5)
    config["rows"] = dict(reversed(config["rows"].items()))
    path = written(tmp_path, config)
    with pytest.raises(UserError, match=r"mini\.yaml: rows\.ours: methods/tokencache\.py: cache_ratio: "):
        load_suite(path)


def test_artefacts_of_another_nfe_are_refused(tmp_path: Path) -> None:
    config = changed("rows/none/nfe", 10)
    config["rows"]["plain10"] = {"method": "uncached", "nfe": 10}
    with pytest.raises(UserError, match=r"rows\.none\.artefacts_from: 'ours' was trained for another nfe"):
        load_suite(written(tmp_path, config))


def test_steps_out_of_range_are_refused(tmp_path: Path) -> None:
    config = changed("rows/few", {"method": "fewer_steps", "nfe": 20, "options": {"steps": 1}})
    with pytest.raises(UserError, match=r"rows\.few: samples 1 steps; give 2 to 1000"):
        load_suite(written(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("suite: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping of fields; see config/digits.yaml"),
        ("", "must be a mapping of fields"),
        (yaml.safe_dump(VALID) + "1: 2", "1: keys should be strings"),
    ],
    ids=["bad YAML", "a list", "empty", "a number as key"],
)
def test_files_that_are_not_configs(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_names_those_that_are_there(tmp_path: Path) -> None:
    written(tmp_path, VALID)
    with pytest.raises(UserError, match=r"mine\.yaml: no such config; did you mean 'mini\.yaml'"):
        load_suite(tmp_path / "mine.yaml")


def test_checking_a_config_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from tcbench.config.load import load_suite; "
        "load_suite(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    path = written(tmp_path, VALID)
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


def test_routers_are_trained_but_predict_nothing(tmp_path: Path) -> None:
    """Diagnostics and the figure of scores describe predictors alone."""
    suite = load_suite(written(tmp_path, changed("rows/router", {"method": "learning_to_cache", "nfe": 20})))
    assert suite.predictor_rows == ("ours",)
    assert set(suite.trained_rows) == {"ours", "router"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_rows_that_borrow_artefacts_leave_their_training_as_it_was(path: Path) -> None:
    """Sampling refuses such a row, minutes into a run; a shipped config must not hold one."""
    suite = load_suite(path)
    for part in (suite, *suite.ablation_suites.values()):
        for row in part.rows:
            check_training(part[row])
