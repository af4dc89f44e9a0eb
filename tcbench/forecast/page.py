"""docs/paper-scale.md, what the paper's suites cost at full scale; `python -m tcbench.forecast.page` makes it again."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.forecast.estimate import Estimate, forecast
from tcbench.forecast.rates import HAND, RECORDED, known_cards
from tcbench.forecast.text import size
from tcbench.outside.places import SHIPPED
from tcbench.record.files import digest, read_json, sha256

PAGE = Path(__file__).parents[2] / "docs" / "paper-scale.md"
SUITES = tuple(
    f"paper-{name}" for name in ("dit-256", "dit-512", "pixart-256", "pixart-256-parti", "pixart-1024", "osp")
)
CARDS, COUNTS = ("h100", "a100"), (1, 8)

_Told = dict[tuple[str, str, int], Estimate]
"""By suite, card and count."""

TARGETS = {"paper-dit-256": 6.0, "paper-pixart-1024": 3.0}
"""Hours of the clock that a suite is to take on 8 H100s, training included."""

HEAD = """\
# The paper's suites at full scale

Made by `python -m tcbench.forecast.page` of the configs, the ledger's MACs and the rates of
`tcbench/assets/forecast/`. Nothing on this page was run as a whole: it is a forecast, and what it rests on is below.
"""

COSTS = """
Hours. Rows are those of tables and ablations. Every training takes all of its iterations; with `patience` it may end
after 30 % of them. The clock is that of list scheduling: jobs begin when what they need is there, a row's samples are
made in as many parts as there are cards, an ablation's rows are shared out, a training is one job on one card
(`training_gpus` of them share it, as if nothing were lost), and nothing runs beside `latency`. *Measured*: the share of
an H100's hours at measured rates; of an A100's, only what the host does is.

GPU hours of an H100 by stage; `ablate` samples and scores the rows of ablations:
"""

TOGETHER = 4
"""Cards that share a training, where the page says what that gives."""

LIMITS = """
What would bring them down is training that takes less, and where one training is what all else waits for, that several
cards share it.
"""

REHEARSED = """\
## What rehearsals took

`tcbench rehearse` on one H200, networks at full size: seconds, and in brackets the forecast of the same jobs as it was
then, which of `paper-pixart-256` and `paper-pixart-1024` did not know yet that metrics of features run on the card.
Peaks are what torch held of the card's 151 GB, over all stages. A dash: not run.

Lines of *3 jobs a card* come of rehearsals that ran at the same time on one card (`TCBENCH_JOBS_PER_GPU=3`), of which
each took 80 GB at most (`--card-memory 80`). Their seconds are nobody's forecast: they show that stages run, and in
what memory. They are also younger: `diagnose` takes a fourth of the passes that it took in the other lines, and in 16
bits where training does. There `diagnose` of FLUX.1 failed on a second copy of the model, which it had no use for. It
no longer makes one and holds weights in 16 bits, and was not run on a card since. 147 GB are its peak with that copy
and 37 fillings of the cache.
"""

RATES = """\
## What is measured, and what is derived

Of an H100. A rate of another card or dtype is converted by the ratio of both peaks of dense products in the makers'
data sheets. So are all of an A100's: 312 of 989 TFLOP/s in 16 bits, 156 of 494 in TF32.

| | rate | | from |
|---|---|---|---|"""

STEPS = """
## Step by step

1. `tcbench validate config/paper-dit-256.yaml --files` names the files that are missing, and where each comes from.
2. `tcbench forecast paper-dit-256 --gpu a100 --gpus 8` is this page for your cards, with every row and every rate.
   With `--calibrate` a full step and some iterations of training are timed on the card at hand first, for about a
   minute.
3. `tcbench rehearse paper-dit-256 --into /scratch/rehearsal` writes stand-ins of every file, networks at their full
   size with random weights, runs every stage on a few samples, and says what each took of time and memory beside its
   forecast. It needs none of the real files. `--minutes 9` begins no other stage after nine minutes, and the same
   command goes on; `--only train` runs a stage again; `--card-memory 80` takes no more than that of a larger card;
   `--size tiny` runs on a CPU.
4. `tcbench run config/paper-dit-256.yaml`. Before its first job the workflow says the forecast of what is left to do,
   and every minute how long the rest takes at the pace so far. It may be stopped at any time and goes on where it
   was.

`results/rehearsals/` has what rehearsals took, stage by stage, with peaks of memory and the forecast's error.
"""


def page() -> str:
    """The page, as Markdown."""
    suites = {name: load_suite(SHIPPED / "config" / f"{name}.yaml") for name in SUITES}
    told = {
        (name, card, count): forecast(suite, card, count)
        for name, suite in suites.items()
        for card in CARDS
        for count in COUNTS
    }
    made = f"<!-- made of {made_of()} -->\n"
    targets = _targets(suites, told)
    parts = [HEAD, made, *_costs(suites, told), COSTS, *_stages(told), *targets, LIMITS, *_rehearsed(), *_rates(told)]
    parts.append(STEPS)
    return "\n".join(parts)


def made_of() -> str:
    """Identifies what the page was made of: the configs, the rates, the code of forecasts, and rehearsals."""
    configs = [SHIPPED / "config" / f"{name}.yaml" for name in SUITES]
    code = sorted(Path(__file__).parent.glob("*.py"))
    return digest([sha256(path) for path in (*configs, HAND, RECORDED, *code, *rehearsals())])


def rehearsals() -> list[Path]:
    """The committed records of what rehearsals took, of a suite those first that had a card alone."""
    paths = (SHIPPED / "results" / "rehearsals").glob("paper-*.json")
    return sorted((path for path in paths if not path.stem.endswith("-tiny")), key=lambda path: path.stem)


def _rehearsed() -> Iterator[str]:
    yield REHEARSED
    records = [read_json(path) for path in rehearsals()]
    shared = [record.get("reduced_to", {}).get("jobs_per_gpu", 1) for record in records]
    of_stages = [_by_stage(record["done"], sharing == 1) for record, sharing in zip(records, shared, strict=True)]
    stages = list(dict.fromkeys(stage for by_stage in of_stages for stage in by_stage))
    yield f"| suite | {' | '.join(stages)} | all | peak |"
    yield "|---" * (len(stages) + 3) + "|"
    for record, sharing, by_stage in zip(records, shared, of_stages, strict=True):
        cells = [_against(*by_stage[stage]) if stage in by_stage else "—" for stage in stages]
        told = [pair for stage, pair in by_stage.items() if stage != "files"]  # which is no job of the suite's
        took, foreseen = (sum(pair[place] for pair in told) for place in (0, 1))
        peak = size(max(job["gpu_bytes"] for job in record["done"].values()))
        steps = record.get("reduced_to", {}).get("most_steps")
        name = f"`{record['suite']}`" + (f", {steps} steps" if steps else "")
        name += f", {sharing} jobs a card" if sharing > 1 else ""
        yield f"| {name} | {' | '.join(cells)} | {_against(took, foreseen)} | {peak} |"
    yield ""


def _by_stage(done: Mapping[str, Any], alone: bool) -> dict[str, tuple[float, float]]:
    """(seconds, forecast) of the jobs of every stage; no forecast of jobs that were not alone on their card."""
    found: dict[str, tuple[float, float]] = {}
    for name, job in done.items():
        stage, (took, foreseen) = name.split()[0], found.get(name.split()[0], (0.0, 0.0))
        found[stage] = took + job["seconds"], foreseen + (job.get("forecast_s", 0.0) if alone else 0.0)
    return found


def _against(took: float, foreseen: float) -> str:
    return f"{took:.0f} ({foreseen:.0f})" if foreseen else f"{took:.0f}"


def cost_line(suite: Suite, told: list[Estimate]) -> str:
    """A suite's line in the table of costs, from its forecasts in the order of the columns."""
    cells = []
    for one in told:
        if one.count == 1:
            cells.append(f"{one.seconds / 3600:.0f}")
        cells.append(f"{one.wall / 3600:.1f}")
    first = told[0]
    sampled = len(suite.rows) + sum(len(ablation.own) for ablation in suite.ablation_suites.values())
    return (
        f"| `{suite.suite}` | {sampled} | {' | '.join(cells)} | {size(first.disk)} | {size(first.memory.memory)} "
        f"({first.memory.stage}) | {first.measured_share():.0%} |"
    )


def _costs(suites: dict[str, Suite], told: _Told) -> Iterator[str]:
    names = [known_cards()[card].name for card in CARDS]
    heads = [head for name in names for head in (f"GPU hours, {name}", *(f"clock, {count} x" for count in COUNTS))]
    yield "## Cost\n"
    yield f"| suite | rows | {' | '.join(heads)} | disk | peak of a card | measured |"
    yield "|---|---" + "|---" * (len(heads) + 3) + "|"
    for name, suite in suites.items():
        yield cost_line(suite, [told[name, card, count] for card in CARDS for count in COUNTS])


def _stages(told: _Told) -> Iterator[str]:
    spent = {name: told[name, "h100", 1].by_stage() for name in SUITES}
    stages = list(dict.fromkeys(stage for by_stage in spent.values() for stage in by_stage))
    yield f"| suite | {' | '.join(stages)} |"
    yield "|---" * (len(stages) + 1) + "|"
    for name, by_stage in spent.items():
        cells = [f"{by_stage[stage] / 3600:.1f}" if stage in by_stage else "" for stage in stages]
        yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""


def _targets(suites: dict[str, Suite], told: _Told) -> Iterator[str]:
    yield "## Targets\n"
    for name, hours in TARGETS.items():
        one = told[name, "h100", 8]
        met = "**is met**" if one.wall <= 3600 * hours else "**is not met**"
        longest = max(one.jobs, key=lambda job: job.seconds / min(job.parts, one.count))
        trained = one.parts_of("train")
        most = max(trained, key=lambda part: trained[part])
        yield f"- `{name}` in at most {hours:g} hours on 8 H100s, training included: the forecast is"
        yield f"  {one.wall / 3600:.1f} hours, so the target {met}."
        yield f"  {one.seconds / 3600:.0f} GPU hours are {one.seconds / 8 / 3600:.1f} hours of 8 cards at best."
        yield f"  The longest job is `{longest.stage} {longest.of}`, {longest.seconds / 3600:.1f} hours on one card;"
        yield f"  most of all training is that of the {most} ({trained[most] / 3600:.0f} hours)."
        together = forecast(suites[name].model_copy(update={"training_gpus": TOGETHER}), "h100", 8)
        yield f"  With `training_gpus: {TOGETHER}` in the config it is {together.wall / 3600:.1f} hours."


def _rates(told: _Told) -> Iterator[str]:
    used = dict.fromkeys(rate for name in SUITES for rate in told[name, "h100", 8].used())
    yield RATES
    for rate in sorted(used, key=lambda rate: (rate.kind == "derived", rate.what, rate.model)):
        of = " ".join(filter(None, (rate.model, rate.dtype)))
        yield f"| {rate.kind} | {rate.what}{f', {of}' if of else ''} | {rate.value:.3g} {rate.unit} | {rate.source} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
