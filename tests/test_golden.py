"""The harness against outputs of the original public code: the cases of tests/golden, as `tcbench golden` runs them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tcbench.cli import main
from tcbench.errors import UserError
from tcbench.golden import weights as golden_weights
from tcbench.golden.case import Case, Unsupported
from tcbench.golden.check import case_names, check_case
from tcbench.golden.kinds import KINDS, Kind
from tcbench.golden.sampling import sample_case
from tcbench.record.files import read_json, read_tensors, write_json, write_tensors
from tcbench.registry import make_method
from tcbench.samplers import training_alphas_cumprod
from tcbench.timesteps import respaced_timesteps
from tests.floors import note

from .conftest import GOLDEN


@pytest.mark.parametrize("name", case_names(GOLDEN))
def test_case(name: str) -> None:
    report = check_case(GOLDEN, name)
    for quantity, entry in report["quantities"].items():
        if entry["tolerance"]:
            note(f"{report['kind']} {quantity}", entry["error"], entry["tolerance"])
    assert report["passed"], report
    compared = set(report["quantities"])
    tokens = {"type", "threshold_in_force", "fresh_count", "fresh_ratio", "fresh_idx", "score"}
    expected = {
        "uncached": {"timesteps", "eps", "eps_from_x_in", "final"},
        "fora": {"timesteps", "eps", "final", "recomputed"},
        "toca": {"timesteps", "eps", "final", *tokens},
        "l2c": {"timesteps", "eps", "final", "recomputed"},
        "toca_pixart": {"timesteps", "eps", "final", *tokens} - {"fresh_ratio"},
        "l2c_training": {"timesteps", "loss", "data_loss", "gates", "mse_per_sample", "gradients", "logits"},
    }
    if name == "pixart_full_dpm20":  # every step is full, so nothing is chosen
        expected["toca_pixart"] -= {"fresh_count", "fresh_idx", "score"}
    assert compared == expected[report["kind"]]


def test_respaced_alphas_match_the_reference() -> None:
    settings = read_json(GOLDEN / "full_ddim20.json")
    alphas = training_alphas_cumprod()[list(respaced_timesteps(20))]
    assert alphas == pytest.approx(settings["alphas_cumprod_used"], rel=1e-9)


@pytest.mark.parametrize(
    ("options", "effect"),
    [({"faithful": False}, 6.5), ({"soft_fresh_weight": 0.0}, 0.44), ({"bonus": 0.0}, 0.36)],
    ids=["once a step", "no ages", "no bonus"],
)
def test_departures_from_toca_have_the_effect_that_the_reference_measured(options: dict, effect: float) -> None:
    """At a setting that no file here holds: 20 steps, interval 3; largest change of a final latent."""
    final = sample_case(Case(GOLDEN, "full_ddim20"), make_method("toca", {})).tensors["final"]
    other = sample_case(Case(GOLDEN, "full_ddim20"), make_method("toca", options)).tensors["final"]
    assert (other - final).abs().max().item() == pytest.approx(effect, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{"faithful": False}, {"soft_fresh_weight": 0.0}, {"cell": 2}, {"bonus": 0.0}, {"fresh_ratio": 0.32}],
    ids=str,
)
def test_the_released_setting_for_pixart_is_seen(options: dict) -> None:
    """Each of its numbers, taken otherwise, changes the final latents by far more than the tolerance."""
    released = {"fresh_ratio": 0.3, "interval": 3, "schedule": "pixart", "bonus": 0.4, "cell": 4}
    case = Case(GOLDEN, "pixart_toca_dpm20_r0.30_n3")
    final = sample_case(case, make_method("toca", released | options)).tensors["final"]
    assert (final - case.expected["final"]).abs().max() > 10 * KINDS["toca_pixart"].tolerances["final"]


def test_pixart_uncached() -> None:
    case = Case(GOLDEN, "pixart_full_dpm20")
    tensors, tolerances = sample_case(case, make_method("uncached", {})).tensors, KINDS["toca_pixart"].tolerances
    for name in ("eps", "final"):
        expected = case.expected[name]  # eps of the last steps alone
        assert (tensors[name][-len(expected) :] - expected).abs().max() <= tolerances[name]


# --- weights that are drawn


def test_draws_are_pytorchs_own() -> None:
    torch.manual_seed(5)
    torch.rand(7)
    drawn = torch.nn.init.xavier_uniform_(torch.empty(24, 16)).view(24, 4, 2, 2)  # as DiT draws its patches
    ours = golden_weights.draw(5, {"w": {"shape": [24, 4, 2, 2], "start": [7], "scaled": [3, 2]}})["w"]
    assert (ours[3:] - drawn[3:]).abs().max() <= 2**-24  # PyTorch rounds once or twice, as the machine has it
    assert torch.equal(ours[:3] / 2, golden_weights.draw(5, {"w": {"shape": [24, 4, 2, 2], "start": [7]}})["w"][:3])


def test_drawn_weights_are_vouched_for(tmp_path: Path) -> None:
    path, recipe = tmp_path / "weights.safetensors", {"w": {"shape": [8, 4], "start": [0]}}
    weights = golden_weights.draw(1, recipe) | {"b": torch.ones(8)}
    golden_weights.write_weights(path, weights, 1, recipe)
    assert read_tensors(path)[0].keys() == {"b"}
    read = golden_weights.read_weights(path)
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)
    write_tensors(path, {"b": torch.zeros(8)}, read_tensors(path)[1])
    with pytest.raises(UserError, match="drawn from seed 1, the weights miss their digest"):
        golden_weights.read_weights(path)


# --- the command, on directories made up from tests/golden


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Weights and inputs, no case yet."""
    for name in ("weights.safetensors", "inputs.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
        shutil.copy(GOLDEN / f"pixart_{name}", tmp_path)
    return tmp_path


def add(directory: Path, name: str, settings: dict, tensors: dict[str, Tensor]) -> None:
    write_json(directory / f"{name}.json", settings)
    write_tensors(directory / f"{name}.safetensors", tensors)


def settings_of(kind: str, **changed: object) -> dict:
    case = {
        "uncached": "full_ddim20",
        "fora": "fora_ddim20_n3",
        "toca": "toca_ddim20_r0.07_n4",
        "pixart": "pixart_toca_dpm20_r0.30_n3",
    }[kind]
    return {**read_json(GOLDEN / f"{case}.json"), **changed}


def add_our_own(directory: Path, name: str, settings: dict, method: str, options: dict, **tensors: Tensor) -> None:
    """A case whose expected tensors are what this package computes: for the path, not the values."""
    add(directory, name, settings, {**tensors, "eps": torch.zeros(1)})
    outcome = sample_case(Case(directory, name), make_method(method, options))
    add(directory, name, settings, {**tensors, **outcome.tensors})


def golden_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    """(status, report, stderr)."""
    status = main(["golden", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else {}, err


def test_command_reports_largest_errors(capsys: pytest.CaptureFixture[str]) -> None:
    status, report, _ = golden_command(capsys, GOLDEN, "fora_ddim20_n3")
    assert (
        status == 0
        and report["passed"] is True
        and report["skipped"] == {}
        and list(report["cases"]) == ["fora_ddim20_n3"]
    )
    final = report["cases"]["fora_ddim20_n3"]["quantities"]["final"]
    assert set(final) == {"error", "tolerance", "passed"}
    assert 0 < final["error"] <= final["tolerance"] == KINDS["fora"].tolerances["final"]


def test_command_finds_a_miss_and_lists_what_it_skips(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    expected, _ = read_tensors(GOLDEN / "fora_ddim20_n3.safetensors")
    expected["final"][0, 0, 0, 0] += 0.01
    expected["recomputed"][3, 1, 0] ^= 1
    expected["eps"][-1, 0] = float("nan")
    add(directory, "off", settings_of("fora"), expected)
    add(directory, "unknown", {"source": "someone/duca@1"}, {"final": torch.zeros(1)})
    status, report, _ = golden_command(capsys, directory)
    quantities = report["cases"]["off"]["quantities"]
    assert status == 1 and not report["passed"] and not report["cases"]["off"]["passed"]
    assert quantities["final"]["error"] == pytest.approx(0.01, rel=0.02) and not quantities["final"]["passed"]
    assert quantities["recomputed"]["error"] == 1 and not quantities["recomputed"]["passed"]
    assert quantities["eps"]["error"] is None and not quantities["eps"]["passed"]
    assert quantities["timesteps"]["passed"]
    assert report["skipped"].keys() == {"unknown"} and "someone/duca" in report["skipped"]["unknown"]


def test_wrong_tokens_are_counted(directory: Path) -> None:
    expected, _ = read_tensors(GOLDEN / "toca_ddim20_r0.07_n4.safetensors")
    rows = expected["fresh_idx"][10, 2]
    absent = [min(set(range(64)) - set(row)) for row in rows.tolist()]
    rows[1, 0] = absent[1]  # one token of one row
    expected["fresh_idx"][10, 1] = expected["fresh_idx"][10, 1].roll(1, dims=0)  # all four rows, within doubt
    expected["kth_gap"][10, 1] = 1e-6
    add(directory, "off", settings_of("toca"), expected)
    quantities = check_case(directory, "off")["quantities"]
    assert [name for name, entry in quantities.items() if not entry["passed"]] == ["fresh_idx"]
    assert quantities["fresh_idx"]["error"] == 1


@pytest.mark.parametrize(
    ("method", "settings", "options"),
    [
        ("uncached", {"timestep_respacing": "ddim10"}, {}),
        ("fora", {"timestep_respacing": "7", "cache_threshold (interval)": "2"}, {"interval": 2}),
        ("fora", {"timestep_respacing": "5", "save_cache": "boost_infer"}, {"interval": 1}),
        ("toca", {"timestep_respacing": "50"}, {"interval": 4}),
    ],
)
def test_other_settings(directory: Path, method: str, settings: dict, options: dict) -> None:
    add_our_own(directory, "other", settings_of(method, **settings), method, options)
    assert check_case(directory, "other")["passed"]
    add_our_own(directory, "other", settings_of(method, **settings), "fora", {"interval": 4})
    assert not check_case(directory, "other")["passed"]


@pytest.mark.parametrize(("name", "rows", "last"), [("noise", 2, True), ("step_noise", 4, False)])
@pytest.mark.parametrize("method", ["uncached", "toca"])
def test_ancestral_cases_use_the_noise_given(directory: Path, name: str, rows: int, last: bool, method: str) -> None:
    noise = torch.randn(6 if last else 5, rows, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = settings_of(method, sampler="p_sample_loop (ancestral)", timestep_respacing="6")
    options = {"interval": 4} if method == "toca" else {}
    add_our_own(directory, "ancestral", settings, method, options, **{name: noise})
    assert check_case(directory, "ancestral")["passed"]
    expected, _ = read_tensors(directory / "ancestral.safetensors")
    add(directory, "ancestral", settings, {**expected, name: noise.flip(0)})
    assert not check_case(directory, "ancestral")["passed"]
    expected.pop(name)
    add(directory, "ancestral", settings, expected)
    with pytest.raises(Unsupported, match="needs a tensor 'noise'"):
        check_case(directory, "ancestral")


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("uncached", {"timestep_respacing": "10,15"}, "timestep_respacing '10,15' is not"),
        ("uncached", {"sampler": "DPM-Solver++"}, "neither DDIM nor ancestral"),
        ("fora", {"save_cache": "other"}, "save_cache 'other'"),
        ("toca", {"ratio_scheduler": "exp"}, "methods/toca.py: schedule: "),
        ("toca", {"cache_type": "random"}, "cache_type 'random' is not 'attention'"),
        ("toca", {"scaled_to_depth": False}, "layer divisor"),
        ("pixart", {"sampler": "DPM-Solver++, order 3"}, "not second-order DPM-Solver++"),
        ("pixart", {"ratio_scheduler": "linear"}, "ratio_scheduler 'linear' is not 'ToCa'"),
    ],
)
def test_what_cannot_be_run_is_skipped(directory: Path, method: str, settings: dict, says: str) -> None:
    add(directory, "case", settings_of(method, **settings), {"final": torch.zeros(1)})
    with pytest.raises(Unsupported) as caught:
        check_case(directory, "case")
    assert says in str(caught.value)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    def fails(*arguments: object) -> str:
        status, report, err = golden_command(capsys, *arguments)
        line = err.strip().splitlines()[-1]
        assert status == 2 and not report and line.startswith("tcbench: ")
        return line

    assert "no case (NAME.json beside NAME.safetensors)" in fails(directory)
    assert "no case 'fora'; cases: " in fails(GOLDEN, "fora")
    add(directory, "case", {"source": "someone/duca@1"}, {"final": torch.zeros(1)})
    assert "nothing could be compared; case: " in fails(directory)
    settings = settings_of("uncached", timestep_respacing="3")
    add(directory, "case", settings, {"final": torch.zeros(2)})
    assert "case.safetensors: final: shape [2], computed [2, 4, 16, 16]" in fails(directory)
    add(directory, "case", settings, {"timesteps": torch.zeros(2)})
    assert "neither eps nor final" in fails(directory)
    settings.pop("cfg_scale")
    add(directory, "case", settings, {"final": torch.zeros(2)})
    assert "case.json: no 'cfg_scale'" in fails(directory)
    add(directory, "case", {**settings, "cfg_scale": "much"}, {"final": torch.zeros(2)})
    assert "case.json: cfg_scale: 'much' is not a number" in fails(directory)
    write_json(directory / "weights.json", {"model_config": {"depth": 4}})
    add(directory, "case", {**settings, "cfg_scale": 1.5}, {"final": torch.zeros(2)})
    assert "weights.json: model_config: 'num_heads' missing or wrong" in fails(directory)


def test_kinds_are_open(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A kind is an entry of `KINDS`: how to know a case, how to run it, what error is allowed."""
    add(directory, "case", {"source": "someone/duca@1"}, {"final": torch.zeros(1)})
    kind = Kind(lambda case: case.repository == "duca", lambda folder, name: {"loss": 1e-5, "count": 0}, {"loss": 1e-4})
    monkeypatch.setitem(KINDS, "duca", kind)
    report = check_case(directory, "case")
    assert report["kind"] == "duca" and report["passed"]
    assert report["quantities"]["count"] == {"error": 0, "tolerance": 0.0, "passed": True}
