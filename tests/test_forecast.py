"""Forecasts: what work is, how rates are found, how jobs share cards, and what the workflow says of it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from tcbench.budget.costing import macs_of, run_of_shapes
from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.forecast import page
from tcbench.forecast.estimate import forecast, minutes, wall_seconds
from tcbench.forecast.progress import EVERY, Left, Listener, announce, minutes_of
from tcbench.forecast.rates import Rate, Rates, known_cards, recorded_rates
from tcbench.forecast.recorded import recorded
from tcbench.forecast.training import forward_macs, parameters, training_work
from tcbench.forecast.work import Job, Work
from tcbench.outside.devices import SEATS
from tcbench.registry import make_method

ROOT = Path(__file__).parent.parent
SECOND = Rate(what="render", value=1, unit="s", kind="measured", source="here")


@pytest.fixture(scope="module")
def smoke() -> Suite:
    return load_suite(ROOT / "tests" / "smoke.yaml")


def job(name: str, seconds: float, *needs: str, stage: str = "sample", parts: int = 1) -> Job:
    return Job(stage, name, (), (name,), needs, lambda: [Work(stage, name, SECOND, seconds)], parts)


# --- rates


def test_every_rate_is_measured_or_derived_and_says_where() -> None:
    rates = Rates("h100")
    for rate in recorded_rates():
        assert rate.kind == "measured" and (rate.source.startswith("results/reference/")), rate
    for what in ("encode", "decode", "features", "readings", "frechet", "process", "render"):
        assert rates.throughput(what).source
    assert set(rates.used) and {rate.kind for rate in rates.used} == {"measured", "derived"}


def test_rates_of_the_card_at_hand_come_first_and_others_are_converted_by_peaks() -> None:
    h100, a100 = (Rates(card).step("dit-xl-2-256", "tf32", 100) for card in ("h100", "a100"))
    peaks = {card: known.peak["tf32"] for card, known in known_cards().items() if card != "cpu"}
    assert h100.kind == "measured" and h100.value == pytest.approx(11862142156800 * 100 / 14.3, rel=0.01)
    assert a100.kind == "derived" and a100.value == pytest.approx(h100.value * peaks["a100"] / peaks["h100"])
    here = Rate(what="step", value=1e12, unit="MACs/s", kind="measured", source="here", card="a100", dtype="tf32")
    calibrated = Rates("a100", [here.model_copy(update={"model": "dit-xl-2-256", "batch": 100})])
    assert calibrated.step("dit-xl-2-256", "tf32", 100).value == 1e12
    on_cpu = Rates("cpu").step("digits-dit", "fp32", 12)
    assert on_cpu.source == "results/reference/digits" and on_cpu.value < 1e12
    with pytest.raises(UserError, match="--gpu k80: is not among h200"):
        Rates("k80")


def test_memory_of_a_model_that_was_not_timed_goes_by_its_stream() -> None:
    published = {"dit-xl-2-256": 675e6, "pixart-1024": 611e6, "wan-1.3b": 1.42e9, "osp-93x256": 2.77e9}
    for model, count in published.items():
        assert parameters(model) == pytest.approx(count, rel=0.03)
    assert 0.8 < parameters("flux-dev") / 11.9e9 < 1, "without the text's own weights"
    rates = Rates("h200")
    small, large = (rates.memory("sample memory", model, 32, "fora") for model in ("fashion-dit", "dit-xl-2-256"))
    assert large.kind == "measured" and small.kind == "derived"
    assert small.value / large.value == pytest.approx(192 / 1152)  # as many tokens and blocks


def test_a_method_that_was_not_timed_is_no_promise() -> None:
    rates = Rates("h100")
    known = rates.efficiency("tokencache", "dit-xl-2-256", 50)
    likened = rates.efficiency("random_tokens", "dit-xl-2-256", 50)
    assert known.kind == "measured" and likened.kind == "derived" and likened.value == known.value
    unknown = rates.efficiency("mine", "dit-xl-2-256", 50)
    assert unknown.kind == "derived" and unknown.value <= known.value
    assert rates.efficiency("uncached", "dit-xl-2-256", 50).value == 1


def test_recorded_rates_are_near_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of two: results that are published again are read again when somebody asks to."""
    monkeypatch.chdir(ROOT)

    def by_kind(rates: list[Rate]) -> dict[tuple[str, str, str], float]:
        found: dict[tuple[str, str, str], list[float]] = {}
        for rate in rates:
            found.setdefault((rate.what, rate.card, rate.model), []).append(rate.value)
        return {key: median(values) for key, values in found.items()}

    now, then = by_kind(recorded()), by_kind(list(recorded_rates()))
    assert then.keys() <= now.keys()
    assert all(0.5 < now[key] / value < 2 for key, value in then.items())


# --- work


def test_a_training_is_its_iterations_at_the_measured_pace() -> None:
    method, model = make_method("tokencache", {}), "dit-xl-2-256"
    predictor, alpha_bar, refiners = training_work(method, model, run_of_shapes(model, 50))
    rate = Rates("h100").training("TrainScorer", model, "tf32", 64, 4 * forward_macs(model))
    assert rate.of(predictor.macs) == pytest.approx(40_000 / 1.84, rel=0.01)  # held-out losses are the rest
    assert rate.of(predictor.macs) > 40_000 / 1.84
    uncached = macs_of(model, make_method("uncached", {}), 50)["per_sample"]
    assert 1 < alpha_bar.macs / (256 * uncached) < 1.1  # the predictor's calls
    assert refiners.trains == "refiners" and refiners.passes == 3
    short = training_work(make_method("tokencache", {"predictor_iterations": 4_000}), model, run_of_shapes(model, 50))
    assert short[0].macs < predictor.macs / 8


def test_the_jobs_are_the_workflows(smoke: Suite) -> None:
    told = forecast(smoke, "cpu", 2)
    made = {output for job in told.jobs for output in job.outputs}
    assert made >= {str(entry.manifest) for entry in smoke.entries}
    assert made >= {str(smoke[row].trained / "artefacts.json") for row in smoke.trained_rows}
    ablations = smoke.ablation_suites.values()
    assert made >= {str(entry.scores) for suite in (smoke, *ablations) for entry in suite.entries}
    assert {job.stage for job in told.jobs} == {"train", "sample", "score", "latency", "diagnose", "ablate", "render"}
    assert told.seconds == pytest.approx(sum(told.by_stage().values()))
    assert told.seconds / 2 <= told.wall <= told.seconds
    for needed in {path for job in told.jobs for path in job.needs}:
        assert needed in made, needed


def test_more_samples_and_steps_are_more_work(smoke: Suite) -> None:
    twice = smoke.model_copy(update={"samples": smoke.samples.model_copy(update={"count": 16})})
    once, double = (forecast(suite, "cpu", 1).parts_of("sample") for suite in (smoke, twice))
    assert double["nfe4-uncached"] == pytest.approx(2 * once["nfe4-uncached"])
    assert once["nfe4-uncached"] > once["nfe4-steps2"]


# --- cards


def test_cards_that_train_together_shorten_the_clock_and_share_the_memory() -> None:
    alone = load_suite("config/paper-pixart-1024.yaml")
    together = alone.model_copy(update={"training_gpus": 4})
    one, four = (forecast(suite, "h200", 8) for suite in (alone, together))
    assert four.seconds == pytest.approx(one.seconds)
    assert 0.25 * one.wall < four.wall < 0.5 * one.wall  # one training is what all else waits for
    memory = [max(job.memory for job in told.jobs if job.stage == "train") for told in (one, four)]
    assert memory[1] < memory[0]


def test_an_ablation_of_a_suite_of_single_rows_is_shared_out_on_cards(smoke: Suite) -> None:
    single = smoke.model_copy(update={"jobs": "row"})
    for suite, card, parts in ((smoke, "h100", {1}), (single, "cpu", {1})):
        assert {job.parts for job in forecast(suite, card, 2).jobs if job.stage == "ablate"} == parts
    shared = {job.of: job.parts for job in forecast(single, "h100", 2).jobs if job.stage == "ablate"}
    assert shared == {name: len(ablation.own) for name, ablation in single.ablation_suites.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("paper-*.yaml")), ids=lambda path: path.stem)
def test_every_stage_of_the_papers_suites_fits_a_card(path: Path) -> None:
    told = forecast(load_suite(path), "h100", 1)
    assert 1e9 < told.memory.memory < 80e9, (told.memory.stage, told.memory.of)


def test_jobs_begin_when_what_they_need_is_there_and_a_card_is_free() -> None:
    chain = [job("a", 3), job("b", 2, "a"), job("c", 4), job("d", 1, "b", "c")]
    assert wall_seconds(chain, 1) == 10
    assert wall_seconds(chain, 2) == 6  # a and c; b; d
    assert wall_seconds(chain, 8) == 6
    assert wall_seconds([*chain, job("alone", 5, stage="latency")], 8) == 11
    assert wall_seconds([], 3) == 0


def test_a_row_is_cut_into_as_many_parts_as_there_are_cards() -> None:
    row, score = job("row", 8, parts=4), job("score", 1, "row", stage="score")
    assert len(row.cut(8)) == 4 and len(score.cut(8)) == 1 and row.cut(1) == [row]
    assert sum(part.seconds for part in row.cut(2)) == pytest.approx(8)
    assert wall_seconds([*row.cut(4), score], 4) == pytest.approx(3)  # scored when all parts are there
    started = replace(row, make=lambda: [Work("sample", "", SECOND.model_copy(update={"what": "process"}), 8)])
    assert [part.seconds for part in started.cut(2)] == [8, 8]  # every part is a process


# --- what is said


def test_the_command_says_all_of_it(smoke: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "tests" / "smoke.yaml")
    assert main(["forecast", config, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["card"] == "cpu" and told["count"] == 2 and told["seconds"] > 0
    assert {rate["kind"] for rate in told["rates"]} <= {"measured", "derived"}
    assert main(["forecast", config]) == 0
    text = capsys.readouterr().out
    assert "core hours" in text and "cache_ratio" in text and "measured step of digits-dit" in text
    assert main(["forecast", config, "--gpus", "0"]) == 2 and main(["forecast", config, "--gpu", "k80"]) == 2


def test_the_workflow_says_what_is_left_and_how_long_it_takes(smoke: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    outputs = {3: [str(smoke["nfe4-tokencache"].trained / "artefacts.json")], 4: ["results/smoke/latency.json"]}
    left = announce([smoke], {**outputs, 5: ["somewhere/else"]}, 2, 1, said.append)
    assert left is not None and len(said) == 1 and len(said[0].splitlines()) == 3
    assert "train" in said[0] and "sample" not in said[0].replace("samples", "")
    assert announce([smoke], {1: ["somewhere/else"]}, 2, 1, said.append) is None
    assert announce([smoke], {1: ["results/smoke/rivals/fora.json"]}, 2, 1, said.append) is None
    assert said[-1].startswith("no forecast of 1 files of rivals")
    monkeypatch.setenv(SEATS, "4")
    on_a_gpu = smoke.model_copy(update={"model": smoke.model.model_copy(update={"device": "cuda"})})
    assert announce([on_a_gpu], outputs, 8, 4, said.append)
    assert "on 1 x" in said[-2] and "4 jobs share a card" in said[-1]
    monkeypatch.delenv(SEATS)

    now = 100.0
    told = forecast(smoke, "cpu", 2)
    jobs = tuple(job for job in told.jobs if job.stage in ("train", "latency"))
    numbers = {number: job.outputs for number, job in enumerate(jobs)}
    lines: list[str] = []
    left = Left([replace(told, jobs=jobs)], numbers, lines.append, lambda: now)
    listener = Listener(left)
    record = logging.LogRecord("snakemake", logging.INFO, "", 0, "Finished jobid: 0", None, None)
    record.event, record.job_id = "job_finished", 0
    listener.emit(record)
    assert not lines  # not yet
    now += EVERY + 1
    record.job_id = len(jobs) - 1
    listener.emit(record)
    assert len(lines) == 1 and "left, until" in lines[0] and "times the forecast so far" in lines[0]


def test_clusters_are_asked_for_half_more_than_the_forecast(smoke: Suite) -> None:
    assert minutes(3600) == 95 and minutes(0) == 5
    output = str(smoke["nfe4-uncached"].manifest)
    assert minutes_of(smoke, output, "cpu") == minutes_of(smoke, "unknown", "cpu") == 5


def test_the_page_is_current() -> None:
    """`python -m tcbench.forecast.page` writes it again."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.made_of() in text
    suite = load_suite(ROOT / "config" / "paper-osp.yaml")
    told = [forecast(suite, card, count) for card in page.CARDS for count in page.COUNTS]
    assert page.cost_line(suite, told) in text
