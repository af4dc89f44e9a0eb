"""Golden cases of methods that choose, check or mix (`tcbench.golden.rivals`): what their code decided, and by what."""

from collections.abc import Callable, Mapping
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from tcbench.artefacts import as_table
from tcbench.golden.case import Case, Unsupported
from tcbench.golden.compare import compare_choices, largest_errors
from tcbench.golden.rivals import Rival, router_of, settings
from tcbench.golden.sampling import Given, Outcome
from tcbench.method import Artefacts
from tcbench.partial import Row
from tcbench.plan import Site


def _partial_choices(case: Case, outcome: Outcome) -> dict[str, float]:
    """Of methods with ToCa's partial steps: how many tokens their MLPs recompute, which ones, and by which scores.

    The reference has -1 or NaN where a block is not partial, and scores where no token is chosen, too.
    """
    expected, blocks = case.expected, range(outcome.run.shape.num_blocks)
    some = expected["fresh_count"] >= 0
    counts = [
        [outcome.executed.at(step, Site(block, "mlp")).count for block in blocks] for step in range(outcome.run.nfe)
    ]
    ours, theirs = {"fresh_count": torch.tensor(counts)}, {"fresh_count": expected["fresh_count"].clamp(min=0)}
    ours["fresh_count"] = ours["fresh_count"].where(some, 0)
    method: Any = outcome.method
    ratios = [
        [method.ratio(outcome.run.nfe - 1 - step, outcome.run.nfe, block, len(blocks)) for block in blocks]
        for step in range(outcome.run.nfe)
    ]
    ours["fresh_ratio"] = torch.tensor(ratios, dtype=torch.float64).where(some, torch.nan)
    theirs["fresh_ratio"] = expected["fresh_ratio"]
    return largest_errors(case, ours, theirs) | compare_choices(case, outcome)


def _rows(outcome: Outcome) -> tuple[Row, ...]:
    method: Any = outcome.method
    rows: tuple[Row, ...] = method.timetable(outcome.run)
    return rows


def _kinds(outcome: Outcome) -> Tensor:
    """What kind each block is of at each step: 0 full, 1 partial, 2 aggressive or, in ProCache, held."""
    number = {"full": 0, "partial": 1, "aggressive": 2, "held": 2}
    return torch.tensor([[number[kind] for kind in row.kinds] for row in _rows(outcome)])


def _intervals(outcome: Outcome) -> Tensor:
    return torch.tensor([row.intervals for row in _rows(outcome)], dtype=torch.float32)


def _draw(case: Case) -> Mapping[str, Given]:
    """The random numbers that a reference drew, for both halves of the guided pairs."""
    draw = case.expected.get("draw")
    if draw is None:
        return {}
    return {"uniform": lambda step: draw[step].transpose(0, 1).repeat(2, 1, 1)}


SHARES = {"ToCa": "ddim50", "ToCa-ddim50": "ddim50", "ToCa-ddpm250": "ddpm250", "linear-layerwise": "ddpm250"}
"""What ToCa's successors for DiT call the schedules of shares."""


def _as_toca(case: Case, **more: str) -> dict[str, Any]:
    """What DuCa and ProCache take from ToCa's settings, and more; the schedule of shares apart.

    Raises:
        Unsupported: a schedule of shares or a way to force full steps that is not here.
    """
    if (shares := case.setting("ratio_scheduler")) not in SHARES:
        raise Unsupported(f"ratio_scheduler {shares!r} is none of {', '.join(SHARES)}")
    if (force := case.settings.get("hyperparameters", {}).get("force_fresh", "global")) != "global":
        raise Unsupported(f"force_fresh {force!r} is not 'global'")
    return settings(
        fresh_ratio="fresh_ratio",
        interval="fresh_threshold",
        score="cache_type",
        soft_fresh_weight="soft_fresh_weight",
        **more,
    )(case)


def _duca(case: Case) -> dict[str, Any]:
    return _as_toca(case) | {"schedule": SHARES[case.setting("ratio_scheduler")]}


def _procache(case: Case) -> dict[str, Any]:
    options = _as_toca(case, schedule="schedule_in_sampling_order", first_partial_block="first_partial_block")
    if (shares := SHARES[case.setting("ratio_scheduler")]) != "ddim50":
        raise Unsupported(f"ratio_scheduler is {shares}; ProCache has ddim50 alone")
    return options


def _router_if_any(case: Case) -> Artefacts:
    return router_of(case) if "router_prob" in case.expected else Artefacts()


def _goc(case: Case) -> dict[str, Any]:
    options = settings(extrapolated_steps="extrapolated_steps", weight="weight")(case)
    if "router_prob" in case.expected:
        return options | {"base": "learning_to_cache", "threshold": case.number("thres")}
    return options | {"reused_steps": case.setting("reused_steps")}


def _verified(outcome: Outcome) -> Tensor:
    return torch.tensor([state["verified"] for state in outcome.states])


def _thresholds(outcome: Outcome) -> Tensor:
    method: Any = outcome.method
    steps = range(outcome.run.nfe)
    return torch.tensor([method.threshold(step, outcome.run.nfe) for step in steps], dtype=torch.float64)


def _checks(case: Case, outcome: Outcome) -> dict[str, float]:
    """By how much of themselves SpeCa's errors differ, where a step after the check looks at them."""
    method: Any = outcome.method
    compared = [state["compared"] for state in outcome.states[1:]]
    pairs = {step: pair.double() for step, pair in enumerate(compared) if pair is not None}
    ours = {
        "verify_l1": [(pair[:, 0] - pair[:, 1]).abs().mean() for pair in pairs.values()],
        "verify_error": [method.error(pair) for pair in pairs.values()],
    }
    errors = {}
    for name, values in ours.items():
        theirs = case.expected[name][list(pairs)]
        relative = [(abs(one.item() - other) / other) for one, other in zip(values, theirs.tolist(), strict=True)]
        errors[name] = max([0.0, *(inf if isnan(error) else error for error in relative)])
    return errors


def _clusters_given(case: Case) -> Mapping[str, Given]:
    """Numbers by which ClusCa chooses the tokens that the reference chose: its first centroids, its representatives."""
    first, chosen, labels = (case.expected[name].long() for name in ("initial_centroid_token", "fresh_idx", "cluster"))
    (_, blocks, rows, clusters), tokens = chosen.shape, labels.shape[2]

    def uniform(step: int) -> Tensor:
        numbers_RLN = torch.zeros(rows, blocks, tokens)
        if step == 0:
            numbers_RLN[:, :, :clusters] = (first[:, None] + 0.5) / tokens
            return numbers_RLN
        full = max(before for before in range(step) if (labels[before] >= 0).all())
        index_RLK = chosen[step].transpose(0, 1)
        of_RLK = labels[full][:, None].expand(-1, blocks, -1).gather(2, index_RLK.clamp(min=0))
        # token 0 stands for empty clusters too, and is then not the choice of its own
        own = (of_RLK == torch.arange(clusters)).float()
        return numbers_RLN.scatter_reduce(2, index_RLK.clamp(min=0), own, "amax")

    return {"uniform": uniform}


def _clusters(case: Case, outcome: Outcome) -> dict[str, float]:
    """ClusCa's labels, which the step after a full one finds, and the tokens that were fresh."""
    wrong = {"cluster": 0.0, "fresh_idx": 0.0, "type": 0.0}
    for step, state in enumerate(outcome.states):
        fresh = state["fresh"]
        wrong["type"] += case.expected["type"][step].item() != (fresh is not None)
        if fresh is not None:
            wrong["fresh_idx"] += (fresh.transpose(0, 1) != case.expected["fresh_idx"][step]).sum().item()
        if step and outcome.states[step - 1]["fresh"] is None:
            wrong["cluster"] += (state["label_RN"] != case.expected["cluster"][step - 1]).sum().item()
    return wrong


def _gates(case: Case) -> Artefacts:
    return Artefacts(tables={"gates": as_table(case.expected["lazy_weight"].flatten(0, 2))})


def _by_part(name: str) -> Callable[[Outcome], Tensor]:
    """What LazyDiT's policy remembers of every part, [S, block, part, R]; NaN or, of rows, all at the first step."""

    def collect(outcome: Outcome) -> Tensor:
        rows, parts = len(outcome.run.sample_index) * outcome.run.rows_per_sample, outcome.run.shape.sites
        nothing = torch.ones(rows, dtype=torch.bool) if name == "masks" else torch.full((rows,), torch.nan)
        steps = [
            torch.stack([torch.as_tensor(state[name].get(site, nothing)) for site in parts]) for state in outcome.states
        ]
        return torch.stack(steps).unflatten(1, (outcome.run.shape.num_blocks, -1))

    return collect


DECIDERS: dict[str, Rival] = {
    "lazydit": Rival(
        "lazydit",
        settings(threshold="attn_threshold", mlp_threshold="mlp_threshold"),
        _gates,
        quantities={"logit": _by_part("logits"), "recomputed_rows": _by_part("masks")},
    ),
    "clusca": Rival(
        "clusca",
        settings(
            interval="interval",
            order="max_order",
            clusters="cluster_num",
            ratio="propagation_ratio",
            first_steps="first_enhance",
        ),
        given=_clusters_given,
        more=_clusters,
    ),
    "speca": Rival(
        "speca",
        settings(
            base_threshold="base_threshold",
            decay="decay_rate",
            min_drafts="min_taylor_steps",
            max_drafts="max_taylor_steps",
            order="max_order",
            metric="error_metric",
        ),
        quantities={"verified": _verified, "threshold": _thresholds},
        tolerances={"verify_l1": 1e-4, "verify_error": 0.6},
        more=_checks,
    ),
    "duca": Rival(
        "duca",
        _duca,
        given=_draw,
        quantities={"type": _kinds, "threshold_in_force": _intervals},
        tolerances={"fresh_ratio": 1e-6},
        more=_partial_choices,
    ),
    "goc": Rival("goc", _goc, _router_if_any),
    "procache": Rival(
        "procache",
        _procache,
        quantities={"type": _kinds},
        tolerances={"fresh_ratio": 1e-6},
        more=_partial_choices,
    ),
    "hicache": Rival(
        "hicache",
        settings(interval="interval", order="max_order", scale="hicache_scale_factor", first_steps="first_enhance"),
    ),
}
"""By the `method` that a case names."""
