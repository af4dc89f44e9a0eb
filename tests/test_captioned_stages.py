"""Captions through the stages: trained on some, sampled for held-out ones, and in the order of the samples."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import pytest
import torch

from tcbench.batches import Batches
from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.data.captions import decode, is_held_out
from tcbench.errors import UserError
from tcbench.models.specs import MODELS
from tcbench.record.files import read_json
from tcbench.record.sources import source_files
from tcbench.registry import data_source
from tcbench.stages import diagnose, sample
from tcbench.stages.conditioning import Captions, load_captions, load_examples
from tcbench.stages.diagnose import diagnose_row
from tcbench.stages.latency import measure_latency
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import read_images
from tcbench.stages.train import train_row
from tcbench.training import sizes
from tests.floors import NETWORK, assert_close
from tests.suites import altered

SMOKE = Path(__file__).with_name("captioned_smoke.yaml")


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    """A network of four blocks: what is tried here is around it."""
    with pytest.MonkeyPatch.context() as patch:
        spec = MODELS["moving-osp"].model_copy(update={"num_blocks": 4, "dense_blocks": (0, 3)})
        patch.setitem(MODELS, "moving-osp", spec)
        yield


@pytest.fixture(scope="module")
def suite(shallow: None) -> Suite:
    return load_suite(SMOKE)


class OneAtATime(Batches):
    """Those of a row, when those of the row before are gone: on a GPU they hold captured steps."""

    alive: ClassVar[WeakSet[Batches]] = WeakSet()

    def __init__(self, *arguments: Any) -> None:
        assert not self.alive
        super().__init__(*arguments)
        self.alive.add(self)


@pytest.fixture(scope="module")
def finished(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the suite was trained, sampled, timed and diagnosed."""
    folder = tmp_path_factory.mktemp("captioned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sample, "Batches", OneAtATime)
        train_row(suite["nfe3-tokencache"])
        sample_rows(suite.entries)
        measure_latency(suite)
        diagnose_row(suite["nfe3-tokencache"])
    return folder


def test_samples_are_of_held_out_captions(suite: Suite, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    manifest, tensors, images = read_images(suite["nfe3-uncached"])
    assert images.shape == (4, 1, 5, 16, 16)
    assert torch.equal(tensors["label"], data_source("moving").captions(torch.arange(4), held_out=True))
    assert all(is_held_out(caption) for caption in decode(tensors["label"]))
    assert manifest["timesteps"][0] == 999  # zero terminal SNR starts at pure noise
    assert manifest["resolution"] == 16
    assert tensors["xt"].shape == (3, 2, 1, 5, 16, 16)


def test_methods_meet_training_captions_only(suite: Suite) -> None:
    shown = load_captions(suite, held_out=False)
    assert isinstance(shown, Captions)
    assert not any(is_held_out(caption) for caption in decode(shown.words(torch.arange(50))))
    examples = load_examples(suite, shown)
    assert len(examples.labels) == len(examples.images) == 2048
    assert torch.equal(examples.labels.mask_RT[:3], shown(torch.arange(3)).mask_RT)  # the same items, by index
    assert_close(examples.labels.states_RTC[:3], shown(torch.arange(3)).states_RTC, NETWORK)


def test_rows_without_refiners_share_the_predictor_alone(
    suite: Suite, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    (with_lora, _, first), (without, _, second) = (read_images(suite[row]) for row in ("nfe3-tokencache", "nfe3-plain"))
    assert with_lora["i_steps"] == without["i_steps"]
    assert with_lora["macs"] == without["macs"]
    assert not torch.equal(first[:], second[:])


def test_an_ablation_samples_what_the_suite_has_not(
    suite: Suite, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    ablation = suite.ablation_suites["cache_ratio"]
    sample_rows(ablation.entries)
    own, other = (read_images(ablation[row])[2][:] for row in ("cache_ratio-r0.9", "cache_ratio-r0.5"))
    assert torch.equal(own, read_images(suite["nfe3-tokencache"])[2][:])
    assert not torch.equal(own, other)


def test_every_row_is_timed_and_the_trained_one_diagnosed(suite: Suite, finished: Path) -> None:
    results = finished / suite.folder
    timed = read_json(results / "latency.json")["rows"]
    assert all(timed[row]["median_s"] > 0 for row in suite.rows)
    assert len(read_json(results / "diagnostics" / "nfe3-tokencache.json")["cases"]) == 37


def test_diagnosing_few_at_once_finds_the_same(suite: Suite, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs others are drawn; whole runs are the same, whatever they run beside."""
    monkeypatch.chdir(finished)
    entry = suite["nfe3-tokencache"]
    before = read_json(entry.diagnostics)
    monkeypatch.setattr(sizes, "ROW_BYTES", 1)
    diagnose_row(entry)
    after = read_json(entry.diagnostics)
    for part, name in (("updates", "similarity"), ("updates", "similarity_over_tokens_std"), ("alpha", "per_batch")):
        np.testing.assert_allclose(after[part][name], before[part][name], atol=2e-3, err_msg=name)  # three digits
    for block, size_SN in before["updates"]["size"].items():
        np.testing.assert_allclose(after["updates"]["size"][block], size_SN, rtol=0.02)
    assert np.shape(after["alpha"]["histogram_per_block"]) == np.shape(before["alpha"]["histogram_per_block"])
    assert [case["selector"] for case in after["cases"]] == [case["selector"] for case in before["cases"]]
    assert all(case["error"] > 0 for case in after["cases"])


def test_errors_in_16_bit_are_those_of_float32_nearly(
    suite: Suite, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every case goes on from the same cache, whatever was tried before it."""
    monkeypatch.chdir(finished)
    entry, rounded = suite["nfe3-tokencache"], suite.dtypes | {"training": "bf16"}
    diagnose_row(entry)
    before = read_json(entry.diagnostics)
    with monkeypatch.context() as patch:
        patch.setattr(diagnose, "RATIOS", diagnose.RATIOS[::-1])
        diagnose_row(entry)
    backwards = read_json(entry.diagnostics)["cases"]
    assert backwards != before["cases"] and all(case in before["cases"] for case in backwards)
    monkeypatch.setattr(Suite, "dtypes", property(lambda _: rounded))
    held, load = [], diagnose.load_adapter
    monkeypatch.setattr(diagnose, "load_adapter", lambda *of, **how: held.append(load(*of, **how)) or held[-1])
    diagnose_row(entry)
    after = read_json(entry.diagnostics)
    assert held[0].dtype == torch.bfloat16, "nothing learns, so no float32 weights are held"
    assert after["provenance"]["dtypes"]["training"] == "bf16"
    errors = [[case["error"] for case in found["cases"]] for found in (after, before)]
    np.testing.assert_allclose(*errors, rtol=0.02)
    assert errors[0] != errors[1]


def test_a_model_without_captions_is_refused(suite: Suite) -> None:
    with pytest.raises(UserError, match="model digits-dit does not read the captions of data moving"):
        Captions(altered(suite, {"model.name": "digits-dit"}), held_out=True)


@pytest.mark.parametrize("stage", ["train", "sample", "latency", "diagnose", "ablate"])
def test_stages_depend_on_data_and_text_encoder(stage: str) -> None:
    files = {Path(path).name for path in source_files(stage, data="moving")}
    assert {"captioned.py", "moving.py", "captions.py", "text.py"} <= files
