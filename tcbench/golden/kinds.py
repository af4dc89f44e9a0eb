"""The kinds of golden cases: which method or model answers a case, and how far it may be from the reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tcbench.errors import UserError
from tcbench.golden import training as golden_l2c
from tcbench.golden import video as golden_video
from tcbench.golden.calibration import run_calibration
from tcbench.golden.case import Case, Unsupported
from tcbench.golden.compare import MARGIN, SCORE_ROUNDING, compare, compare_tokens
from tcbench.golden.deciders import DECIDERS
from tcbench.golden.rivals import RIVALS, TOLERANCES, Rival, router_of
from tcbench.golden.sampling import sample_case
from tcbench.registry import make_method


@dataclass(frozen=True)
class Kind:
    """A kind of case.

    Attributes:
        matches: whether a case is of this kind, by its settings.
        run: (directory, name) -> the largest error by quantity; raises `Unsupported` for settings it cannot run.
        tolerances: the largest error allowed, by quantity, or what reads it from the case; 0 for one that is not named,
            which is then exact.
    """

    matches: Callable[[Case], bool]
    run: Callable[[Path, str], dict[str, float]]
    tolerances: Mapping[str, float] | Callable[[Case], Mapping[str, float]]


def _run_uncached(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    return compare(case, sample_case(case, make_method("uncached", {})))


def _run_fora(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    mode = case.setting("save_cache")
    if mode not in ("boost_infer_static", "boost_infer"):
        raise Unsupported(f"save_cache {mode!r} is not 'boost_infer_static' or 'boost_infer'")
    interval = int(case.number("cache_threshold")) if mode == "boost_infer_static" else 1  # boost_infer reuses nothing
    return compare(case, sample_case(case, make_method("fora", {"interval": interval})))


def _run_toca(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    for setting, known in (("cache_type", "attention"), ("force_fresh", "global")):
        if case.setting(setting) != known:
            raise Unsupported(f"{setting} {case.setting(setting)!r} is not {known!r}")
    schedule = str(case.setting("ratio_scheduler"))
    if case.pixart and schedule != "ToCa":
        raise Unsupported(f"ratio_scheduler {schedule!r} is not 'ToCa'")
    if case.settings.get("scaled_to_depth") is False:
        raise Unsupported("the layer divisor of its schedule was not scaled to the model's depth")
    options = {
        "fresh_ratio": case.number("fresh_ratio"),
        "interval": int(case.number("fresh_threshold")),
        "schedule": "ddpm250" if schedule == "linear-layerwise" else schedule.removeprefix("ToCa-"),
        "soft_fresh_weight": case.number("soft_fresh_weight"),
    }
    if case.pixart:
        options |= {"schedule": "pixart", "bonus": 0.4, "cell": 4}  # fixed in the released code
    try:
        method = make_method("toca", options)
    except UserError as error:
        raise Unsupported(str(error)) from error
    outcome = sample_case(case, method)
    return compare(case, outcome) | compare_tokens(case, outcome)


def _run_learning_to_cache(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    method = make_method("learning_to_cache", {"threshold": case.number("thres")})
    return compare(case, sample_case(case, method, router_of(case)))


def _train_learning_to_cache(directory: Path, name: str) -> dict[str, float]:
    return golden_l2c.run_training(Case(directory, name))


def _run_video(run: Callable[[Case], dict[str, float]]) -> Callable[[Path, str], dict[str, float]]:
    return lambda directory, name: run(Case(directory, name))


def _rival(name: str, rival: Rival) -> Kind:
    return Kind(
        lambda case: case.settings.get("method") == name,
        lambda directory, case: rival.run(Case(directory, case)),
        {**TOLERANCES, **rival.tolerances},
    )


def _allowed(**rounding: float) -> dict[str, float]:
    return {quantity: MARGIN * seen for quantity, seen in rounding.items()}


_TRAJECTORY = _allowed(eps=1.1e-5, eps_from_x_in=7.3e-6, final=1.7e-4)

KINDS: dict[str, Kind] = {
    "uncached": Kind(lambda case: case.repository == "dit", _run_uncached, _TRAJECTORY),
    "fora": Kind(lambda case: case.repository == "fora", _run_fora, _TRAJECTORY),
    "toca": Kind(
        lambda case: case.repository == "toca" and not case.pixart,
        _run_toca,
        _TRAJECTORY | _allowed(fresh_ratio=1e-7, score=SCORE_ROUNDING),
    ),
    "toca_pixart": Kind(
        lambda case: case.repository == "toca" and case.pixart,
        _run_toca,
        _allowed(timesteps=6.2e-5, eps=5.1e-5, eps_from_x_in=3.4e-5, final=1.2e-3, score=SCORE_ROUNDING),
    ),
    "l2c": Kind(
        lambda case: case.repository == "learning-to-cache" and "router_prob" in case.expected,
        _run_learning_to_cache,
        _TRAJECTORY,
    ),
    "l2c_training": Kind(
        lambda case: case.repository == "learning-to-cache" and "router_prob" not in case.expected,
        _train_learning_to_cache,
        _allowed(loss=2.3e-6, data_loss=2.3e-6, gates=1e-7, mse_per_sample=4.1e-6, gradients=4.1e-10, logits=3e-8),
    ),
    "osp": Kind(
        lambda case: case.repository == "open-sora-plan" and "sampler" in case.settings,
        _run_video(golden_video.run_sampling),
        golden_video.stated_tolerances,
    ),
    "osp_forward": Kind(
        lambda case: case.repository == "open-sora-plan" and "caption" in case.expected,
        _run_video(golden_video.run_forward),
        golden_video.stated_tolerances,
    ),
    "wf_vae": Kind(
        lambda case: case.repository == "open-sora-plan" and "video" in case.expected,
        _run_video(golden_video.run_autoencoder),
        golden_video.stated_tolerances,
    ),
    "wf_vae_parts": Kind(
        lambda case: case.repository == "open-sora-plan" and "of" in case.settings,
        _run_video(golden_video.run_parts),
        lambda case: dict.fromkeys(case.expected, 1e-4),
    ),
    "wf_vae_wavelets": Kind(
        lambda case: case.repository == "open-sora-plan" and "ramp" in case.expected,
        _run_video(golden_video.run_wavelets),
        lambda case: dict.fromkeys(case.expected, case.number("tolerance")),
    ),
    "smoothcache_calibration": Kind(
        lambda case: case.settings.get("method") == "smoothcache_calibration",
        lambda directory, name: run_calibration(Case(directory, name)),
        TOLERANCES,
    ),
    **{name: _rival(name, rival) for name, rival in (RIVALS | DECIDERS).items()},
}
"""The kinds of cases by name; the first that matches runs a case."""
