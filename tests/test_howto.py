"""The examples of docs/add-*.md, and what `tcbench init` writes, work as they are printed."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tcbench.budget.costing import macs_of
from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.config.needs import needs
from tcbench.config.suite import Suite
from tcbench.data import to_uint8
from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.method import Run
from tcbench.metrics.catalogue import METRICS, Metric
from tcbench.metrics.extractors import Features
from tcbench.metrics.samples import Real, Samples
from tcbench.metrics.scoring import score_row
from tcbench.models.adapter import Adapter
from tcbench.models.networks import FAMILIES, build_transformer, make_adapter
from tcbench.models.specs import MODELS
from tcbench.plan import ALL, Block, Plan, Span, every_unit
from tcbench.record.files import read_json
from tcbench.registry import data_source, make_method
from tcbench.report.compare import compare
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.stages.conditioning import load_examples
from tcbench.stages.pretrain import pretrain
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import measure_floor, score_rows
from tcbench.starter import write_starter
from tcbench.stats import batches
from tests.suites import with_fields

DOCS, CONFIG = (Path(__file__).parent.parent / folder for folder in ("docs", "config"))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def example(name: str, first_line: str) -> str:
    """The block of a page that begins with this comment."""
    (block,) = re.findall(rf"```\w+\n# {re.escape(first_line)}\n(.*?)```", page(name), re.DOTALL)
    return block


def load_module(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file as a module that can be imported by this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


# a family


@pytest.fixture
def waves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """The example, as if its file and its two lines were where the page says."""
    path, name = tmp_path / "waves.py", "tcbench.models.waves"
    path.write_text(example("add-a-family.md", "tcbench/models/waves.py"), encoding="utf-8")
    module = load_module(path, name, monkeypatch)
    monkeypatch.setitem(FAMILIES, "waves", name)
    spec = eval(example("add-a-family.md", "an entry of MODELS"), {"WavesSpec": module.WavesSpec})
    monkeypatch.setitem(MODELS, spec.name, spec)
    return make_adapter(build_transformer(spec, zero_init=False), spec)


def test_a_family_computes_what_its_network_does(waves: Adapter) -> None:
    latent = torch.randn(4, *waves.spec.latent_shape, generator=torch.Generator().manual_seed(0))
    label, run = torch.arange(4), Run(waves.shape, (700.0,), waves.spec.guidance(), torch.arange(2))
    units = [waves.shape.sites, [Block(block) for block in range(3)], [Span(0, 3)]]
    with torch.inference_mode():
        expected = waves.plain(latent, torch.full((4,), 700.0), label)
        for plan in (Plan(), *(every_unit(of_kind, ALL) for of_kind in units)):
            engine = Engine(waves, run)
            x, condition = engine.embed(0, latent, engine.prepare(label))
            assert torch.equal(waves.unembed(engine.hidden(plan, 0, x, condition), condition), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fora", {"interval": 2}),
        ("toca", {"interval": 2, "fresh_ratio": 0.5, "schedule": "constant"}),
        ("random_tokens", {"num_full_steps": 2, "refiner_blocks": 1}),
    ],
)
def test_methods_run_on_a_family_of_ones_own(waves: Adapter, name: str, options: dict[str, Any]) -> None:
    method = make_method(name, options)
    labels = {"prompts": lambda index: index % 5}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        samples = sample_batch(waves, method, 4, SamplerSettings(1.5), torch.arange(2), **labels)
    assert samples.plans.i_steps != (0, 1, 2, 3) and samples.macs["per_sample"] == counter.get_total_flops() / 4
    assert macs_of("tiny-waves", method, 4)["per_sample"] == samples.macs["per_sample"]


# a metric


@pytest.fixture
def feature_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Metric:
    """The example, as if its file and its entry were where the page says."""
    path, name = tmp_path / "feature_shift.py", "tcbench.metrics.feature_shift"
    path.write_text(example("add-a-metric.md", "tcbench/metrics/feature_shift.py"), encoding="utf-8")
    load_module(path, name, monkeypatch)
    entry = eval(example("add-a-metric.md", "an entry of METRICS"), {"Metric": Metric})
    monkeypatch.setitem(METRICS, entry.name, entry)
    return entry


def test_the_example_metric_is_scored_compared_and_accepted(feature_shift: Metric, tmp_path: Path) -> None:
    def features(count: int, shift: float) -> Features:
        pooled = torch.randn(count, 3, generator=torch.Generator().manual_seed(count)) + shift
        return Features(pooled, pooled, pooled)

    near, far, real = Samples(features(32, 0.1)), Samples(features(32, 2)), Real(features(500, 0))
    measured = [score_row(*rows, real, batches(32, 4), ["feature_shift"]) for rows in ((far, near), (near, None))]
    cell = measured[0]["feature_shift"]
    assert cell["value"] == pytest.approx(2 * 3**0.5, rel=0.2) and cell["se"] > 0
    shared = {"nfe": 20, "samples": 32, "groups": 8, "group_sizes": [4] * 8, "extractor": None}
    rows = (shared | {"row": name, "quality": score} for name, score in zip(("far", "near"), measured, strict=True))
    found = compare(*rows, "feature_shift")
    assert found.paired and found.outcome == "worse"  # lower is better

    settings = yaml.safe_load((Path(__file__).parent / "smoke.yaml").read_text(encoding="utf-8"))
    metrics = re.search(
        r"```yaml\nscoring:\n  .*\n  metrics: \[(.*?)\]", (DOCS / "add-a-metric.md").read_text("utf-8")
    )[1].split(", ")
    settings["scoring"]["metrics"] = metrics
    settings["show"]["tables"] = {"table2": {"title": "Table II", "metrics": metrics[:2]}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert load_suite(tmp_path / "suite.yaml").scoring.metrics == tuple(metrics)


# a method


def test_the_example_method_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "methods").mkdir()
    code = example("add-a-method.md", "methods/rear_blocks.py")
    assert len(code.splitlines()) < 40
    (tmp_path / "methods" / "rear_blocks.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    method = make_method("rear_blocks", {"held": 14})
    # 10 full steps, and 40 with half of the blocks: 0.6 of 11.862 TMACs, but for embedding and final layer
    assert macs_of("dit-xl-2-256", method, 50)["per_sample"] / 11.862e12 == pytest.approx(0.6, abs=1e-3)
    row = yaml.safe_load(re.search(r"```yaml\n(rows:.*?)```", page("add-a-method.md"), re.DOTALL)[1])["rows"]
    settings = yaml.safe_load((CONFIG / "digits.yaml").read_text(encoding="utf-8"))
    settings["rows"] |= row
    (tmp_path / "digits.yaml").write_text(json.dumps(settings), encoding="utf-8")  # which is YAML
    assert load_suite(tmp_path / "digits.yaml").added_rows == ("nfe20-rear",)
    command = re.search(r"^tcbench (match .*?) +# its knob", page("add-a-method.md"), re.MULTILINE)[1]
    assert main(command.split()) == 0


# a model


def test_a_config_describes_a_model(tmp_path: Path, working: Path) -> None:
    model = yaml.safe_load(example("add-a-model.md", "the model of a config"))["model"]
    suite = changed(working / "config/shapes.yaml", {"model": model})
    assert MODELS["my-dit"].num_blocks == 4 and suite.model.shape == model["shape"]
    with pytest.raises(UserError, match=r"model: shape.family: 'dot' is unknown; did you mean 'dit'"):
        changed(working / "config/shapes.yaml", {"model": model | {"shape": model["shape"] | {"family": "dot"}}})
    with pytest.raises(UserError, match="model: shape: num_heads: "):
        changed(working / "config/shapes.yaml", {"model": model | {"shape": model["shape"] | {"num_heads": 0}}})
    with pytest.raises(UserError, match="another model is called tiny-dit"):
        changed(working / "config/shapes.yaml", {"model": model | {"name": "tiny-dit"}})


def test_a_config_without_a_shape_has_the_digests_of_before(working: Path) -> None:
    assert "shape" not in load_suite(CONFIG / "digits.yaml").settings("sample")["model"]


# to start from


def test_what_init_writes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From nothing to a table with one's own method and images in it."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "pictures")
    assert main(["init", "mine"]) == main(["init", "shapes", "--images", "pictures"]) == 0
    assert "mine" in load_suite(Path("config/mine.yaml")).rows
    with pytest.raises(UserError, match="is there already"):
        write_starter("mine", None)
    with pytest.raises(UserError, match=r"config/scenes\.yaml: 'scenes' is there already"):
        write_starter("scenes", None)
    with pytest.raises(UserError, match=r"my-method: use lower-case letters, digits and '_', a letter first"):
        write_starter("my-method", None)
    for name, images in (("my_method", None), ("my_other_1", Path("pictures"))):
        assert f"next: tcbench demo {name.replace('_', '-')}  " in "".join(write_starter(name, images))
        assert load_suite(Path("config") / f"{name.replace('_', '-')}.yaml")[name].method.label == name
    settings = yaml.safe_load(Path("config/shapes.yaml").read_text(encoding="utf-8"))
    rows = {"uncached": {"method": "uncached"}, "shapes": {"method": "shapes", "options": {"num_full_steps": 3}}}
    settings["rows"] = {name: row | {"nfe": 3} for name, row in rows.items()}
    settings = with_fields(settings, {"samples.count": 4, "samples.batch_size": 2, "show.figure.nfe": 3})
    Path("small.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    capsys.readouterr()
    assert main(["demo", "small.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "MAC ratio" in printed and re.search(r"^shapes +1\.00", printed, re.MULTILINE)
    assert "TokenCache is trained, so it is not here" in printed
    assert (tmp_path / "results/shapes/grids/nfe3.png").stat().st_size > 500


# data


def write_images(folder: Path, size: tuple[int, int] = (16, 16)) -> None:
    """Ten images each of classes 1, 2 and 10, whose red is their class's number."""
    for name in ("10", "2", "1"):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", size, (int(name), 20 * number, 255)).save(folder / name / f"image {number}.png")


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files and the images of its config."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data/shapes")
    for file in ("config/shapes.yaml", "data_sets/stripes.py"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(example("add-data.md", file), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def known_models() -> Iterator[None]:
    """Those that configs describe are gone afterwards."""
    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)


def changed(suite: Path, changes: dict[str, Any]) -> Suite:
    """The suite of a config with some fields changed."""
    settings = with_fields(yaml.safe_load(suite.read_text(encoding="utf-8")), changes)
    suite.with_name("changed.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load_suite(suite.with_name("changed.yaml"))


def test_a_suite_of_class_folders_is_sampled_and_scored(working: Path) -> None:
    suite = load_suite(working / "config/shapes.yaml")
    assert {need.name: need.problem for need in needs(suite)} == {"data": None, "scoring.metrics": None}
    sample_rows(suite.entries)
    score_rows(suite.entries)
    score = read_json(working / "results/shapes/scores/nfe4-fora.json")
    assert list(score["quality"]) == ["kid", "mae", "psnr"]
    assert score["quality"]["kid"]["se"] > 0 and score["quality"]["mae"]["value"] > 0
    measure_floor(changed(working / "config/shapes.yaml", {"scoring.floor_draws": 2}))
    assert read_json(working / "results/shapes/scores/floor.json")["fid"]["n"] == 12


def test_class_folders_are_read_in_order_and_trained_on(working: Path) -> None:
    (working / "data/shapes/.DS_Store").write_bytes(b"hidden")
    (working / "data/shapes/2/.thumbnails").mkdir()
    (working / "data/shapes/2/image 10.png").write_bytes((working / "data/shapes/2/image 9.png").read_bytes())
    suite = load_suite(working / "config/shapes.yaml")
    data = load_examples(suite, None)
    assert data.labels.tolist() == [0] * 10 + [1] * 11 + [2] * 10
    assert to_uint8(data.images)[:, 0, 0, 0].tolist() == [1] * 10 + [2] * 11 + [10] * 10
    assert to_uint8(data.images)[:10, 1, 3, 3].tolist() == list(range(0, 200, 20))
    changes = {"iterations": 2, "batch_size": 4, "warmup": 1, "log_every": 1}
    pretrain(suite, "denoiser", working, changes)
    assert len(read_json(working / "denoiser-log.json")["history"]) == 2


def test_what_was_made_of_a_folder_depends_on_its_files(working: Path) -> None:
    path = working / "config/shapes.yaml"
    before = load_suite(path).settings("score")
    assert load_suite(path).settings("score") == before
    (working / "data/shapes/2/image 9.png").unlink()
    assert load_suite(path).settings("score") != before
    assert changed(path, {"data.folder": "data/elsewhere"}).settings("score")["files_of_data"] == ""


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: Image.new("RGB", (8, 16)).save(folder / "2/image 3.png"), "is 8x16, the first image 16x16"),
        (lambda folder: (folder / "2/image 3.png").write_bytes(b"no"), r"2/image 3.png: not a readable image"),
        (lambda folder: (folder / "2/notes.txt").write_bytes(b"no"), r"2/notes.txt: not one of .apng, .avif, "),
        (lambda folder: (folder / "notes.txt").write_bytes(b"no"), r"notes.txt: lies beside the classes' folders"),
        (lambda folder: (folder / "3").mkdir(), r"shapes/3: no images in the folder of a class"),
    ],
)
def test_bad_files_in_class_folders_are_named(working: Path, spoil: Any, says: str) -> None:
    spoil(working / "data/shapes")
    with pytest.raises(UserError, match=says) as caught:
        load_suite(working / "config/shapes.yaml").source.images()
    assert "\n" not in str(caught.value)


def test_configs_and_folders_must_agree(working: Path) -> None:
    path = working / "config/shapes.yaml"
    with pytest.raises(UserError, match=r"data\.folder: data 'folders' are files of yours; name their folder"):
        changed(path, {"data.folder": None})
    with pytest.raises(UserError, match=r"data\.folder: data 'stripes' are not read from a folder; remove it"):
        changed(path, {"data.name": "stripes"})
    with pytest.raises(UserError, match=r"data\.name: 'folder' is unknown; did you mean 'folders'"):
        changed(path, {"data.name": "folder"})
    with pytest.raises(UserError, match=r"data\.folder: nowhere is not a folder"):
        data_source("folders", Path("nowhere")).images()


def test_a_data_set_of_ones_own(working: Path) -> None:
    source = data_source("stripes")
    train, held_out = source.parts(0)
    assert len(train) == len(held_out) == 128 and not torch.equal(train.images, held_out.images)
    upright, flat = train.images[0, 0], train.images[1, 0]
    assert (upright == upright[:1]).all() and (flat == flat[:, :1]).all() and not torch.equal(upright, flat)
    suite = changed(working / "config/shapes.yaml", {"data.name": "stripes", "data.folder": None})
    sample_rows([suite["nfe4-uncached"]])
    score_rows([suite["nfe4-uncached"]])
    assert "kid" in read_json(working / "results/shapes/scores/nfe4-uncached.json")["quality"]
    (working / "data_sets/stripes.py").write_text("class Stripes: pass", encoding="utf-8")
    with pytest.raises(UserError, match="must define exactly one DataSource with name = 'stripes'"):
        _fresh("stripes", working)


def _fresh(name: str, folder: Path) -> None:
    """Load a data set as another process would: its class is kept by path."""
    other = folder / "elsewhere/data_sets"
    other.mkdir(parents=True)
    (other / f"{name}.py").write_bytes((folder / f"data_sets/{name}.py").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(other.parent)
        data_source(name)
