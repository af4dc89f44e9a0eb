"""Suite configs: every mistake is one line that names the file, the field and the fix, before anything runs."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tcbench.budget.borrowing import check_training
from tcbench.cli import main
from tcbench.config.document import read_document
from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tests.suites import with_fields

FOLDER = Path(__file__).parent.parent / "config"
SPEED = "\nmodels:"  # what `is_speed_config` looks for, without parsing all of them in every process that collects
CONFIGS = [path for path in sorted(FOLDER.glob("*.yaml")) if SPEED not in path.read_text(encoding="utf-8")]

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


TABLE = {"title": "T", "metrics": ["fid"]}
ABLATION = {"title": "T", "question": "Q?", "base": "fora", "rows": {"x": {}}}

BAD = [
    # field, value, what the message must hold
    ("sampels", {}, ["sampels: unknown key", "did you mean 'samples'"]),
    ("rows/fora/optoins", {}, ["rows.fora.optoins: unknown key", "did you mean 'options'"]),
    ("rows/plain/paper/fidd", 1.0, ["rows.plain.paper.fidd: unknown key", "did you mean 'fid'"]),
    ("sampler/guidance_scala", 1.0, ["sampler.guidance_scala: unknown key", "did you mean 'guidance_scale'"]),
    ("latency/zzz", 1, ["latency.zzz: unknown key", "known: batch_size, warmup, repeats"]),
    ("model/name", ..., ["model.name: field required"]),
    ("samples/count", "many", ["samples.count: input should be a valid integer", "not 'many'"]),
    ("samples/count", 0, ["samples.count: input should be greater than or equal to 1", "not 0"]),
    ("model/name", "dit-xl", ["model.name: 'dit-xl' is unknown; did you mean 'dit-xl-2-"]),
    ("scoring/metrics", ["fid", "fvd"], ["scoring.metrics.1: 'fvd' is unknown; did you mean 'fid'"]),
    ("model/device", "tpu", ["model.device: input should be 'cpu' or 'cuda'", "not 'tpu'"]),
    ("suite", "My Suite", ["suite: use lower-case letters"]),
    ("sampler/guidance_scale", -1, ["sampler.guidance_scale: input should be greater than or equal to 0", "not -1"]),
    ("rows", [1], ["rows: input should be a valid dictionary", "not a list"]),
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
    ("rows/fora/full_steps_of", "theirs", ["rows.fora.full_steps_of: 'theirs' is not a row"]),
    ("rows/fora/full_steps_of", "plain", ["rows.fora.full_steps_of: 'plain' has no full steps of its own"]),
    ("rows/plain/full_steps_of", "fora", ["rows.plain.full_steps_of: uncached takes no list of full steps"]),
    ("rows/plain/searched", True, ["rows.plain.searched: uncached takes no list of full steps"]),
    ("rows/none/searched", {"keys": ["cached"]}, ["rows.none.searched: options are searched at the MACs of a row"]),
    ("rows/none/options/full_steps", [0, 20], ["rows.none: methods/no_tokens.py: give either num_full_steps or full"]),
    ("rows/fora/options", {"full_steps": [0, 20]}, ["rows.fora.options.full_steps: 20 is no step of 20; remove it"]),
    ("rows/none/artefacts_from", "theirs", ["rows.none.artefacts_from: 'theirs' is not a row that is trained"]),
    ("rows/none/artefacts_from", ..., ["rows.none.options.schedule: 'adaptive' needs artefacts_from; or set 'even'"]),
    ("rows/a b", {"method": "uncached", "nfe": 20}, ["rows.a b: use letters, digits"]),
    ("show/figure/nfe", 50, ["show.figure.nfe: no row has nfe 50"]),
    ("samples/batch_size", 25, ["samples.batch_size: an interval needs two shards or more; give 24 or less"]),
    # names that would be files elsewhere, or are taken
    ("suite", "reference", ["suite: the name reference is taken"]),
    ("show/tables", {"/elsewhere/x": TABLE}, ["show.tables./elsewhere/x: use letters"]),
    ("show/tables", {"../../x": TABLE}, ["show.tables.../../x: use letters"]),
    ("show/tables", {"verdicts": TABLE}, ["show.tables.verdicts: the name verdicts is taken"]),
    ("show/tables", {"Table1": TABLE}, ["show.tables.Table1: the name Table1 is taken"]),
    ("show/tables", {"ablation-x": TABLE}, ["the name ablation-x is taken"]),
    ("rows/floor", {"method": "uncached", "nfe": 20}, ["rows.floor: the name floor is taken"]),
    ("rows/..", {"method": "uncached", "nfe": 20}, ["rows...: use letters"]),
    ("rows/fora/method", "/elsewhere/evil", ["rows.fora.method: use letters"]),
    ("rows/fora/method", "../../downloads/evil", ["rows.fora.method: use letters"]),
    ("data/name", "../evil", ["data.name: '../evil' is unknown"]),
    ("vbench/environment", "/elsewhere", ["vbench.environment: unknown key"]),
    ("scoring/clip/model", "hf-hub:someone/model", ["scoring.clip.model: string should match pattern"]),
    ("data/prompts/template", "{0.__class__}", ["data.prompts.template: write {} once"]),
    ("data/prompts/template", "{} {:>1000000000}", ["data.prompts.template: write {} once"]),
    # numbers that mean nothing, or another thing
    ("samples/seed", 2**70, ["samples.seed: a number of 22 digits"]),
    ("samples/seed", -1, ["samples.seed: input should be greater than or equal to 0"]),
    ("samples/count", True, ["samples.count: input should be a valid integer, not True"]),
    ("samples/count", 10**12, ["samples.count: input should be less than or equal to 10000000"]),
    ("sampler/guidance_scale", 1e308, ["sampler.guidance_scale: input should be less than or equal to 1000"]),
    ("sampler/guidance_scale", float("nan"), ["sampler.guidance_scale: .nan is no finite number"]),
    ("rows/ours/options/beta", float("-inf"), ["rows.ours.options.beta: -.inf is no finite number"]),
    # what a model cannot have
    ("sampler/solver", "euler_ancestral", ["sampler.solver: 'euler_ancestral' takes another prediction"]),
    ("scoring/extractor", "digit-reader", ["scoring.extractor: digit-reader knows scenes and moving, not digits"]),
    ("model/name", "scenes-pixart", ["data.name: scenes-pixart is conditioned on captions", "bring classes"]),
    ("model/name", "tiny-dit", ["model.weights: those of tiny-dit do not ship", "model.latents: tiny-dit denoises"]),
    ("model/text_encoder", "/nope", ["model.text_encoder: data 'digits' are no prompts for it to read; remove it"]),
    ("data/prompts", {"clean": True}, ["data.prompts: data 'digits' are no published set of prompts; remove it"]),
    ("training/images", {"folder": "x"}, ["training.images: data 'digits' bring the images"]),
    ("scoring/metrics", ["fid", "clip_score"], ["scoring.metrics.1: clip_score reads captions"]),
    ("rows/fora/refiners", "p-steps", ["rows.fora.refiners: the row samples with nothing trained"]),
    ("rows/fora/guidance_scale", 2.0, ["rows.fora: nothing to compare with", "nfe: 20 and guidance_scale: 2"]),
    ("samples", {"count": 6, "batch_size": 3}, ["samples.count: recall needs 4 samples when a shard is left out"]),
    ("samples", {"count": 2, "batch_size": 1}, ["samples.count: fid needs 2 samples when a shard is left out, and 1"]),
    # ablations
    ("ablations", {"a": ABLATION | {"rows": {"x": {"options": [1]}}}}, ["ablations.a.rows.x.options: input should"]),
    ("ablations", {"a": ABLATION | {"rows": {"x": {"options": None}}}}, ["ablations.a.rows.x.options: input should"]),
    ("ablations", {"a": ABLATION | {"base": [1]}}, ["ablations.a.base: input should be a valid string"]),
    ("ablations", {"a": ABLATION | {"rows": {"x": {"nfe": 20, "nope": 1}}}}, ["rows.x.nope: unknown key"]),
    ("ablations", {"a": ABLATION | {"rows": {"x": {"options": {"keys": 1}}}}}, ["ablations.a.rows.x: methods/fora.py"]),
    ("ablations", {"a/b": ABLATION}, ["ablations.a/b: use letters"]),
    ("ablations", {"a": ABLATION | {"guidance_scales": [1.0, 1.0]}}, ["guidance_scales: 1, 1: a scale comes twice"]),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD, ids=[f"{field}={value}" for field, value, _ in BAD])
def test_mistakes_are_explained(tmp_path: Path, field: str, value: Any, says: list[str]) -> None:
    path = written(tmp_path, changed(field, value))
    with pytest.raises(UserError) as caught:
        load_suite(path)
    message = str(caught.value)
    assert all(line.startswith(f"{path}: ") and "(line " in line for line in message.splitlines())
    assert len(message.splitlines()) <= len(says) and all(part in message for part in says), message


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
    for steps, says in (1, "samples 1 steps; give 2 to 1000"), (25, "fewer_steps: steps: 25 are more than"):
        config = changed("rows/few", {"method": "fewer_steps", "nfe": 20, "options": {"steps": steps}})
        with pytest.raises(UserError, match=rf"rows\.few: {says}"):
            load_suite(written(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("suite: [1, 2", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping of fields; see config/digits.yaml"),
        ("", "must be a mapping of fields"),
        (yaml.safe_dump(VALID) + "1: 2", "1: unknown key"),
    ],
    ids=["bad YAML", "a list", "empty", "a number as key"],
)
def test_files_that_are_not_configs(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    nfe: 20\n    options", "    nfe: 024\n    options", "rows.fora.nfe: write 24, or '024' in quotes"),
        ("differs: not the", "differs: no #", "about.differs: write true or false, or 'no' in quotes"),
        ("count: 48", "count: 48\n  count: 24", "samples.count: given twice, in lines 13 and 14; remove one"),
        (
            "num_full_steps: 12",
            "num_full_steps: 12\n      num_full_steps: 3",
            "rows.fora.options.num_full_steps: given",
        ),
        ("count: 48", f"count: {'9' * 5000}", "samples.count: 5000 characters; give at most 4000"),
        ("count: 48", "count: 1e999", "samples.count: 1e999 is no finite number"),
        ("count: 48", "count: 4_8", "samples.count: write 4_8 as a plain decimal number"),
        ("count: 48", "count: !!python/name:os.system 48", "samples.count: tags such as 'python/name:os.system'"),
        ("count: 48", f"count: {'[' * 5000}", "not valid YAML: more than 20 levels deep"),
        ("rows:", "more: &a [1]\nother: [*a, *a]\nrows:", "not valid YAML: an alias; write the value out"),
        ("four rows", '"four\\e rows"', "about.description: holds control characters"),
    ],
)
def test_yamls_surprises_are_refused_by_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = yaml.safe_dump(VALID, sort_keys=False)
    assert old in text
    path = written(tmp_path, text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert f"{path}: {says}" in str(caught.value) and "(line " in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_says_what_yaml_says(path: Path) -> None:
    assert read_document(path).value == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in the schema hides none of another group, of another row, or between them."""
    config = with_fields(
        VALID,
        {
            "about.differs": ...,
            "data.name": "digit",
            "scoring.extractor": ...,
            "sampler.solver": "euler_ancestral",
            "rows.plain.paper.fidd": 1,
            "rows.fora.options.num_full_steps": 21,
            "rows.none.artefacts_from": "theirs",
            "show.figure.columns": 0,
        },
    )
    path = written(tmp_path, config)
    assert main(["validate", str(path)]) == 2
    fields = [line.removeprefix(f"tcbench: {path}: ").split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert fields == [
        *("about.differs", "data.name", "sampler.solver", "show.figure.columns"),
        *("rows.plain.paper.fidd", "rows.fora.options.num_full_steps", "rows.none.artefacts_from"),
    ]
    assert main(["validate", str(written(tmp_path, with_fields(config, {"data.name": "digits"})))]) == 2
    assert "scoring.extractor: fid compares features" in capsys.readouterr().err  # data are known now


def test_what_would_fail_later_is_said_by_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "model": {"name": "tiny-dit", "weights": "denoiser.pt", "latents": {"kind": "sd", "folder": "vae"}},
        "data.name": "imagenet",
        "training.images.folder": "train",
        "scoring": {"extractor": "inception-v3-adm", "extractor_weights": "inception.pth", "real": "real.npz"},
    }
    path = written(tmp_path, with_fields(VALID, changes))
    assert main(["validate", str(path), "--files"]) == 1
    said = capsys.readouterr().out
    for field, file in (
        ("model.weights", "denoiser.pt"),
        ("model.latents.folder", "vae"),
        ("training.images.folder", "train"),
        ("scoring.extractor_weights", "inception.pth"),
        ("scoring.real", "real.npz"),
    ):
        assert f"missing {field}: {file}, " in said
    assert "5 of 5 missing" in said


def test_refiners_of_a_row_that_trains_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"rows.ours.options.refiner_rank": 0, "rows.none.refiners": "p-steps"}
    path = written(tmp_path, with_fields(VALID, changes))
    assert main(["validate", str(path)]) == 2
    assert capsys.readouterr().err == f"tcbench: {path}: row none: refiners: ours trains none; remove the field\n"


def test_rows_of_no_table_are_shown_at_the_end_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"table2": TABLE | {"rows": ["plain", "ours"]}}
    path = written(tmp_path, changed("show/tables", tables))
    suite = load_suite(path)
    assert suite.added_rows == ("fora", "none")
    assert suite.tables["table2"].rows == ("plain", "ours", "fora", "none")
    assert main(["validate", str(path)]) == 0
    assert "listed in no table, so at the end of table2: fora, none\n" in capsys.readouterr().out
    whole = load_suite(written(tmp_path, VALID))
    assert whole.added_rows == () and whole.tables == whole.show.tables
    of_none = load_suite(written(tmp_path, changed("show/tables", {})))
    assert of_none.added_rows == (), "claims are tested on all rows where there is no table"


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
