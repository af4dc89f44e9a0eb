"""ToCa's timetable, scores and costs by hand; tests/test_golden.py holds whole runs against the released code."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tcbench.budget.costing import macs_of
from tcbench.choose import AttentionScore
from tcbench.errors import UserError
from tcbench.guidance import Unguided
from tcbench.method import ModelShape, Run
from tcbench.plan import ALL, NONE, Deferred, Plan, Site, Tokens
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tests.floors import SCORE, assert_close

from .conftest import make_shape

SMALL = make_shape(3, 4)


def run_of(nfe: int, shape: ModelShape = SMALL) -> Run:
    return Run(shape, tuple(range(nfe))[::-1], Unguided(), torch.arange(2))


def counted_down(method, nfe: int) -> tuple[list[int], list[int]]:
    """The steps that are full in all blocks, and those that are in block 0 alone, as steps to go."""
    rows = method.timetable(run_of(nfe))
    everywhere = [nfe - 1 - step for step, row in enumerate(rows) if all(row.full)]
    first_block = [nfe - 1 - step for step, row in enumerate(rows) if row.full == (True, False, False)]
    assert len(everywhere) + len(first_block) == sum(any(row.full) for row in rows)
    return everywhere, first_block


# --- when


@pytest.mark.parametrize("schedule", ["ddim50", "ddpm250", "pixart", "constant"])
def test_timetables_are_rounded_as_torch_rounds_float32(schedule: str) -> None:
    """The released code computes them with torch; some shares of tokens lie within rounding of a whole number."""
    shape, slope = (
        make_shape(28, 32),
        -0.2 if schedule == "pixart" else 0.4,
    )
    for nfe, interval, share in itertools.product((10, 20, 50), (2, 3, 4, 7), (0.07, 0.3, 0.5)):
        method = make_method("toca", {"schedule": schedule, "interval": interval, "fresh_ratio": share})
        for counter in range(int(0.4 * nfe), nfe):
            divisor = torch.tensor(1 + slope - 2 * slope * counter / nfe, dtype=torch.float32)
            assert method.renewed_interval(counter, nfe) == int((interval / divisor).round())
        for step, row in enumerate(method.timetable(run_of(nfe, shape))):
            ratios = [method.ratio(method.counter(step, nfe), nfe, block, 28) for block in range(28)]
            counts = (torch.tensor(ratios, dtype=torch.float32).clamp(0, 1) * 1024).int().tolist()
            assert row.counts == tuple(1024 if full else part for full, part in zip(row.full, counts, strict=True))


def test_full_and_mixed_steps_of_the_released_setting() -> None:
    full, mixed = counted_down(make_method("toca", {}), 50)
    assert full == [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert mixed == [45, 32]


def test_deciding_once_a_step_makes_mixed_steps_full() -> None:
    full, mixed = counted_down(make_method("toca", {"faithful": False}), 50)
    assert len(full) == 20 and not mixed and {45, 32} <= set(full)


def test_intervals_round_in_float32_and_half_to_even() -> None:
    """Interval 2 at i / S = 0.75 is 2 / 0.8: 2.5 in float32, which rounds to 2; more than 2.5 in float64."""
    method = make_method("toca", {"interval": 2})
    assert method.renewed_interval(15, 20) == 2
    assert [method.renewed_interval(left, 20) for left in (19, 8, 7, 4, 3, 0)] == [3, 2, 2, 2, 2, 1]


def test_without_fresh_tokens_it_is_fora(tiny) -> None:
    index, settings = torch.arange(2), SamplerSettings(1.5)
    theirs = sample_batch(tiny, make_method("fora", {"interval": 3}), 10, settings, index)
    ours = sample_batch(tiny, make_method("toca", {"interval": 3, "fresh_ratio": 0.0}), 10, settings, index)
    assert torch.equal(ours.image, theirs.image) and ours.plans == theirs.plans and ours.macs == theirs.macs


# --- how many


def test_counts_follow_the_schedule() -> None:
    rows = make_method("toca", {}).timetable(run_of(50, make_shape(28, 16)))
    for left, first, last in ((37, 0.006, 0.008), (25, 0.14, 0.21), (1, 0.41, 0.61)):  # ddim50 at R = 0.07
        row = rows[49 - left]
        assert (row.counts[0], row.counts[27]) == pytest.approx((256 * first, 256 * last), abs=2), left
    early = [row for row in rows[:12] if not row.full[1]]
    assert early and all(not any(row.counts[1:]) for row in early)  # none in the first quarter


@pytest.mark.parametrize(("left", "first", "last"), [(249, 0.19, 0.021), (125, 0.315, 0.035), (1, 0.44, 0.049)])
def test_ratios_of_ddpm250(left: int, first: float, last: float) -> None:
    method = make_method("toca", {"schedule": "ddpm250"})
    assert [method.ratio(left, 250, block, 28) for block in (0, 27)] == pytest.approx([first, last], rel=0.03)


def test_ratios_are_clamped_and_truncated() -> None:
    rows = make_method("toca", {"fresh_ratio": 1.0}).timetable(run_of(50))
    assert {count for row in rows for count in row.counts} >= {0, 16} and max(max(row.counts) for row in rows) == 16
    constant = make_method("toca", {"fresh_ratio": 0.12, "schedule": "constant"}).timetable(run_of(50))
    assert {count for row in constant for full, count in zip(row.full, row.counts, strict=True) if not full} == {1}


# --- which


@dataclass
class FakeLook:
    """Fixed attention, different in each row and block."""

    run: Run
    step: int = 0

    def attention_received(self, block: int) -> Tensor:
        return torch.rand(2, self.run.shape.num_tokens, generator=torch.Generator().manual_seed(block)) + 0.1


def score_by_hand(received: list[float], ages: list[int], method, side: int = 4) -> list[float]:
    norm = sum(value**2 for value in received) ** 0.5
    score = [
        value / norm + method.soft_fresh_weight * age / method.base_interval(0)
        for value, age in zip(received, ages, strict=True)
    ]
    for top in range(0, side, 2):
        for left in range(0, side, 2):
            best = max((side * (top + y) + left + x for y in (0, 1) for x in (0, 1)), key=score.__getitem__)
            score[best] *= 1 + method.bonus
    return score


@pytest.mark.parametrize("options", [{}, {"bonus": 0.0}, {"soft_fresh_weight": 2.0, "interval": 5}])
def test_scores_and_ages(options: dict) -> None:
    """Over a run: every row by itself, ages counted from the last refresh, the highest scores chosen."""
    method = make_method("toca", {"fresh_ratio": 0.3, **options})
    run = run_of(20)
    look, state = FakeLook(run), method.start(run)
    ages = [[[0] * 16 for _ in range(2)] for _ in range(3)]
    chosen = 0
    for step, row in enumerate(method.timetable(run)):
        look.step = step
        plan = state.plan(look)
        for block in range(3):
            who = plan.at(Site(block, "mlp")).who
            for number, age in enumerate(ages[block]):
                if row.full[block]:
                    age[:] = [0] * 16
                    continue
                if isinstance(who, Tokens):
                    chosen += 1
                    score = score_by_hand(look.attention_received(block)[number].tolist(), age, method)
                    assert_close(state.scores[Site(block, "mlp")][number], score, SCORE)
                    ranked = sorted(range(16), key=score.__getitem__, reverse=True)
                    assert set(who.index_RK[number].tolist()) == set(ranked[: row.counts[block]])
                age[:] = [years + 1 for years in age]
                for token in who.index_RK[number].tolist() if isinstance(who, Tokens) else []:
                    age[token] = 0
    assert chosen > 20


def test_the_best_of_a_cell_gains_the_bonus() -> None:
    """The released code's result on the ramp i / 16, up to the L2 norm of s1."""
    ramp = torch.arange(16.0) / 16
    s4 = AttentionScore((4, 4), age_weight=0.0, interval=1, bonus=0.6)
    rows = s4.of(ramp.expand(2, 1, 16), torch.zeros(2, 1, 16))
    score = rows[0, 0] * ramp.norm()
    assert_close(score[[5, 7, 13, 15]], [0.5, 0.7, 1.3, 1.5], SCORE)
    others = [token for token in range(16) if token not in (5, 7, 13, 15)]
    assert_close(score[others], ramp[others], SCORE)


def test_only_an_mlp_whose_map_is_refreshed_before_it_waits() -> None:
    """Everything else is chosen when the step starts; the waiting choice sees the refreshed map, and no token."""
    shape = make_shape(2, 4, text_tokens=5)
    run, entropy = run_of(10, shape), torch.rand(2, 16, generator=torch.Generator().manual_seed(1))

    class TextLook(FakeLook):
        def attention_entropy(self, block: int) -> Tensor:
            return entropy

    def stream() -> Tensor:
        raise AssertionError("ToCa chooses by what was observed")

    look = TextLook(run)
    options = {"schedule": "pixart", "fresh_ratio": 0.4, "interval": 5, "soft_fresh_weight": 0.0, "bonus": 0.0}
    state = make_method("toca", options).start(run)
    state.plan(look)
    look.step = 1
    plan = state.plan(look)
    cross, mlp = (plan.decisions[Site(0, branch)].who for branch in ("cross", "mlp"))
    assert isinstance(cross, Tokens) and isinstance(mlp, Deferred)
    best = entropy.argsort(descending=True)[:, : cross.count]
    assert torch.equal(cross.index_RK, best)
    entropy.scatter_(1, best, -1.0)
    chosen = mlp.choose(stream)
    assert isinstance(chosen, Tokens) and 0 < chosen.count == mlp.like.count
    assert torch.equal(chosen.index_RK, entropy.argsort(descending=True)[:, : chosen.count])


def test_attention_is_observed_only_if_it_is_read() -> None:
    method, run = make_method("toca", {}), run_of(50)
    rows, look, state = method.timetable(run), FakeLook(run), method.start(run)
    plans: list[Plan] = []
    for look.step in range(50):
        plans.append(state.plan(look))
    for block in range(3):
        observed, read = set(), set()
        seen = None
        for step, (row, plan) in enumerate(zip(rows, plans, strict=True)):
            decision = plan.at(Site(block, "attn"))
            assert decision.who is (ALL if row.full[block] else NONE)
            if decision.who is ALL:
                seen = step
                observed |= {step} if decision.observe else set()
            elif row.counts[block]:
                read.add(seen)
        assert observed == read and 49 not in observed


def test_an_odd_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"toca: its 2x2 cells do not tile the token grid \(3, 3\)"):
        make_method("toca", {}).start(run_of(10, make_shape(2, 3)))


# --- costs: of the released counter on DiT-XL/2, which leaves the scores out


@pytest.mark.parametrize(
    ("resolution", "nfe", "options", "tmacs"),
    [
        (256, 50, {}, 5.121),
        (256, 50, {"faithful": False}, 5.567),
        (256, 50, {"interval": 4}, 4.37),
        (256, 50, {"fresh_ratio": 0.1}, 5.47),
        (256, 20, {"interval": 2}, 2.68),
        (256, 20, {}, 2.01),
        (256, 10, {"interval": 2}, 1.34),
        (512, 20, {"interval": 2}, 11.73),
        (256, 250, {"interval": 4, "schedule": "ddpm250"}, 21.74),
    ],
)
def test_macs_of_known_settings(resolution: int, nfe: int, options: dict, tmacs: float) -> None:
    totals = macs_of(f"dit-xl-2-{resolution}", make_method("toca", options), nfe)
    digits = len(str(tmacs).partition(".")[2])
    assert round(totals["per_sample_without_overheads"] / 1e12, digits) == tmacs
    tokens, width = resolution**2 // 256, 1152
    score = totals["by_tag"]["score"]
    assert score % (2 * tokens**2 * width) == 0 and 0 < score <= totals["full_steps"] * 29 * 2 * tokens**2 * width
    assert totals["per_sample"] == totals["per_sample_without_overheads"] + score
