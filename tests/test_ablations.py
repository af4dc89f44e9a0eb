"""Ablations: variants of a row become rows of a suite of their own, and their table compares them with the first."""

from pathlib import Path

import pytest
import torch

from tcbench.config.fields import Ablation
from tcbench.config.load import load_suite
from tcbench.errors import UserError
from tcbench.method import Artefacts
from tcbench.plan import Tokens
from tcbench.record.records import TRAINED
from tcbench.registry import make_method
from tcbench.report.ablation_table import table_ablation
from tcbench.report.main_table import main_table
from tcbench.report.rows import row_that_trained
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.stages import sample
from tcbench.stages.ready import load_adapter, ready_row
from tcbench.stages.score import marks_of_training

from .test_contract import artefacts_for
from .test_report import make_rows, spread

SMOKE = Path(__file__).parent / "smoke.yaml"


@pytest.fixture
def suite():
    return load_suite(SMOKE)


def changed(tmp_path, old, new):
    path = tmp_path / "changed.yaml"
    text = SMOKE.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_variants_share_what_was_trained_for_their_base(suite):
    ablation = suite.ablation_suites["cache_ratio"]
    assert ablation.own == ("cache_ratio-reference4", "cache_ratio-r0.9", "cache_ratio-r0.7")
    assert ablation.variants == ("cache_ratio-r0.9", "cache_ratio-r0.7")
    assert ablation["cache_ratio-r0.7"].method == suite["nfe4-tokencache"].method.model_copy(
        update={"cache_ratio": 0.7}
    )
    assert ablation["cache_ratio-r0.7"].trained_as.name == "nfe4-tokencache"
    assert ablation["nfe4-tokencache"].trained == suite.folder / "trained" / "nfe4-tokencache"
    assert ablation.folder == suite.folder / "ablations" / "cache_ratio"
    assert suite.find("cache_ratio-r0.7").suite is ablation and suite.find("nfe4-fora").suite is suite


def test_a_sweep_repeats_variants_and_compares_them_at_their_own_scale(suite):
    ablation = suite.ablation_suites["guidance"]
    assert ablation.own[:2] == ("guidance-uncached-cfg1", "guidance-uncached-cfg2")
    assert ablation["guidance-tokencache-cfg2"].reference.name == "guidance-uncached-cfg2"
    assert ablation["guidance-tokencache-cfg2"].guidance_scale == 2
    assert suite["nfe4-tokencache"].guidance_scale == 1.5


def test_another_method_inherits_neither_options_nor_artefacts(suite):
    ablation = suite.ablation_suites["refiners"]
    row = ablation.rows["refiners-uncached-lora"]
    assert (row.method, row.options, row.artefacts_from) == ("uncached", {}, "nfe4-tokencache")
    assert ablation["refiners-uncached-lora"].reference.name == "refiners-reference4"  # refined, so it is no reference
    assert ablation["refiners-retrained"].trained_as.name == "refiners-retrained"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base: nfe4-uncached", "base: nowhere", "ablations.guidance.base: base 'nowhere' is not a row"),
        ("{options: {cache_ratio: 0.7}}", "{options: {cache_rate: 0.7}}", "cache_rate"),
        ("{refiners: false}", "{refiner: false}", "ablations.refiners.rows.predictor-plain.refiner"),
        ("  cache_ratio:\n    title", "  cache ratio:\n    title", "letters, digits and '_' only"),
    ],
)
def test_a_bad_ablation_is_named(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_suite(changed(tmp_path, old, new))


def test_borrowed_artefacts_of_other_training_are_refused(tmp_path, monkeypatch):
    path = changed(tmp_path, "r0.7: {options: {cache_ratio: 0.7}}", "r0.7: {options: {refiner_blocks: 3}}")
    suite = load_suite(path).ablation_suites["cache_ratio"]
    with pytest.raises(UserError, match="change what nfe4-tokencache was trained with; set `artefacts_from: null`"):
        ready_row(suite["cache_ratio-r0.7"], load_adapter(suite))


def test_the_table_compares_with_the_first_variant():
    rows = [row for row in make_rows() if row["nfe"] == 20][:4]
    for row in rows:
        row["row"] = row["row"].replace("nfe20", "schedule")
        row["reference"] = "schedule-uncached"
        row["group_sizes"] = [64] * 8
        spread(row, "fid", 0.1)
    variants = [row["row"] for row in rows[1:]]
    ablation = Ablation(title="Table VIII", question="Which?", base="nfe20-fora", rows={})
    table = table_ablation(ablation, rows, variants, suite="digits", differs="")
    assert table.tidy["row"].tolist() == variants
    assert table.tidy["fid_difference"].isna().tolist() == [True, False, False]
    assert table.formatted["FID"].tolist()[0] == "4.10 [3.98, 4.22]"
    # the same replicates but for a constant: a difference without spread, which shows nothing
    assert [text.split()[-1] for text in table.formatted["FID"][1:]] == ["?", "?"]
    spread(rows[2], "fid", 0.3)
    spread(rows[3], "fid", 0.11)
    table = table_ablation(ablation, rows, variants, suite="digits", differs="")
    assert [text.split()[-1] for text in table.formatted["FID"][1:]] == ["better", "better"]  # -.7 +- .47, -.2 +- .02
    spread(rows[2], "fid", 1.0)
    table = table_ablation(ablation, rows, variants, suite="digits", differs="", margins={("fid", 20): 0.3})
    assert [text.split()[-1] for text in table.formatted["FID"][1:]] == ["?", "better"]
    rows[3]["quality"]["fid"]["value"] = 4.1
    spread(rows[3], "fid", 0.11)
    table = table_ablation(ablation, rows, variants, suite="digits", differs="", margins={("fid", 20): 0.3})
    assert table.formatted["FID"][2].endswith(" equivalent") and "FID 0.3 at NFE 20" in table.caption
    rows[3]["marks"] = ["saturated"]
    for shown in (table_ablation(ablation, rows, variants, suite="digits", differs=""),
                  main_table(rows, None, None, differs="", guidance_scale=1.5)):  # fmt: skip
        assert f"{rows[3]['label']} (NFE 20): saturated." in shown.caption


def samples_of(adapter, method):
    artefacts = artefacts_for(adapter, 5)
    return sample_batch(adapter, method, 5, SamplerSettings(1.5), torch.arange(2), artefacts)


def test_shared_halves_choose_the_same_tokens(tiny):
    options = {"num_full_steps": 2, "beta": -20, "refiner_blocks": 1, "cache_ratio": 0.7}

    class Seen:
        """Looks at a step where both halves score differently."""

        def __init__(self, run):
            self.run, self.step = run, 1

        def scores(self, name):
            return torch.rand(4, 4, 64, generator=torch.Generator().manual_seed(0))

    from .conftest import make_run

    run = make_run(tiny, 5, torch.arange(2), Artefacts(alpha_bar=(0.1, 0.2, 0.3, 0.4, 0.5)))

    def chosen(halves):
        plan = make_method("tokencache", options | {"guided_halves": halves}).plan(Seen(run))
        tokens = [decision.who for decision in plan.decisions.values()]
        assert all(isinstance(who, Tokens) for who in tokens)
        return torch.cat([who.index_RK[:, : who.count].sort(1).values for who in tokens], dim=1)

    shared, independent = chosen("shared"), chosen("independent")
    assert torch.equal(*shared.chunk(2)) and not torch.equal(*independent.chunk(2))


def test_the_oracle_is_closer_to_uncached_than_chance(tiny):
    """It knows which updates changed; if it did no better than random tokens it would not know it."""
    options = {"num_full_steps": 2, "refiner_blocks": 1, "cache_ratio": 0.5}
    uncached = samples_of(tiny, make_method("uncached", {})).image
    error = {
        name: (samples_of(tiny, make_method(name, options)).image - uncached).abs().mean().item()
        for name in ("oracle_tokens", "random_tokens")
    }
    assert 0 < error["oracle_tokens"] < error["random_tokens"]
    charged = samples_of(tiny, make_method("oracle_tokens", options)).macs
    assert charged["by_tag"]["oracle"] > 0
    assert charged["per_sample_without_overheads"] == charged["per_sample"] - charged["by_tag"]["oracle"]


def test_refiners_can_be_left_out(tmp_path, suite, monkeypatch):
    """The same artefacts with and without what LoRA changed."""
    monkeypatch.chdir(tmp_path)
    from tcbench.stages.train import train_row

    train_row(suite["nfe4-tokencache"])
    ablation, adapter = suite.ablation_suites["refiners"], load_adapter(suite)
    plain = ready_row(ablation["refiners-predictor-plain"], adapter)
    refined = ready_row(ablation["refiners-predictor-lora"], adapter)
    assert plain.adapter is adapter and refined.adapter is not adapter
    assert plain.artefacts.alpha_bar == refined.artefacts.alpha_bar
    path = suite["nfe4-tokencache"].trained / "artefacts.json"
    log = TRAINED.read(path)
    log["stages"][0]["marks"] = ["saturated"]
    TRAINED.write(path, log)
    mark = "saturated (training of nfe4-tokencache)"
    assert row_that_trained(mark) == "nfe4-tokencache" and row_that_trained("saturated") is None
    assert mark in marks_of_training(suite["nfe4-random"]) and not marks_of_training(suite["nfe4-uncached"])


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("shard-*.safetensors")}


def test_a_variant_that_changes_nothing_takes_its_rows_samples(tmp_path, suite, monkeypatch):
    """The same bytes as if it had been sampled, without sampling: trajectories, which ablations do not keep, go."""
    ablation, row = suite.ablation_suites["cache_ratio"], "cache_ratio-reference4"
    assert ablation[row].twin == "nfe4-uncached"
    assert ablation["cache_ratio-r0.7"].twin is None and suite["nfe4-uncached"].twin is None
    for folder in ("alone", "after"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    sample.sample_rows([ablation[row]])
    monkeypatch.chdir(tmp_path / "after")
    sample.sample_rows([suite["nfe4-uncached"]])
    monkeypatch.setattr(sample, "Batches", None)
    sample.sample_rows([ablation[row]])
    alone, after = (shards(tmp_path / folder / ablation.folder) for folder in ("alone", "after"))
    assert len(alone) == 2 and alone == after


def test_more_samples_keep_those_that_there_are(tmp_path, suite, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.sample_rows([suite["nfe4-uncached"]])
    before, sampled = shards(suite.folder), []
    monkeypatch.setattr(sample, "_sample_shards", lambda entry, numbers, *rest: sampled.extend(numbers))
    monkeypatch.setattr(sample, "_write_manifest", lambda *_, **__: None)
    sample.sample_rows([load_suite(changed(tmp_path, "count: 8", "count: 10"))["nfe4-uncached"]])
    sample.sample_rows([load_suite(changed(tmp_path, "traced: 4", "traced: 2"))["nfe4-uncached"]])
    assert sampled == [2, 0] and shards(suite.folder) == before


def test_further_training_seeds_are_an_ablation_of_everything_trained(tmp_path, suite):
    assert suite.repeats == {} and "trainings" not in suite.ablations
    path = changed(tmp_path, "\njobs:", "\ntraining: {seed: 5}\ntrainings: 3\njobs:")
    several = load_suite(path)
    assert set(several.repeats) == {"nfe4-l2c", "nfe4-tokencache", "nfe4-random"}
    assert several.repeats["nfe4-random"] == ("trainings-nfe4-random-1", "trainings-nfe4-random-2")
    ablation = several.ablation_suites["trainings"]
    assert set(ablation.own) == {"trainings-reference4", *(row for rows in several.repeats.values() for row in rows)}
    first, second = ablation["trainings-nfe4-tokencache-1"], several["nfe4-tokencache"]
    assert (first.training_seed, second.training_seed) == (6, 5)
    assert (first.training_settings | {"training_seed": None}) == second.training_settings
    assert first.trained_as.name == first.name and first.method == second.method
    assert ablation["trainings-nfe4-random-2"].trained_as.training_seed == 7
    assert several.find(first.name).suite is ablation and first.reference.twin  # the uncached samples are copied
    with pytest.raises(UserError, match=r"ablations\.trainings: is made for `trainings`"):
        load_suite(changed(tmp_path, "ablations:\n  cache_ratio:", "trainings: 2\nablations:\n  trainings:"))


def test_further_training_seeds_of_one_row_and_of_those_that_share_it(tmp_path):
    path = changed(tmp_path, "\njobs:", "\ntrainings: 3\ntrainings_of: [nfe4-tokencache]\njobs:")
    assert set(load_suite(path).repeats) == {"nfe4-tokencache", "nfe4-random"}
    for row in ("nfe4-uncached", "nfe4-nothing"):
        path = changed(tmp_path, "\njobs:", f"\ntrainings: 3\ntrainings_of: [{row}]\njobs:")
        with pytest.raises(UserError, match=rf"trainings_of\.0: '{row}' is no row that trains something; give some of"):
            load_suite(path)


def test_a_training_seed_of_nothing_trained_is_refused(tmp_path):
    path = changed(tmp_path, "{method: uncached, nfe: 4}", "{method: uncached, nfe: 4, training_seed: 1}")
    with pytest.raises(UserError, match=r"rows\.nfe4-uncached\.training_seed: nothing is trained"):
        load_suite(path)
