"""What tables say of the seed-noise yardstick (`tcbench.metrics.seed_noise`), beside distances to the uncached run."""

from collections.abc import Iterable, Mapping, Sequence

from tcbench.metrics.catalogue import METRICS
from tcbench.metrics.inference import Sampled, value_interval
from tcbench.record.yardstick import Yardstick
from tcbench.report.cells import difference_text
from tcbench.report.rows import Row
from tcbench.stats import Interval

MATCHED = "each sample against the next one that shows the same, of a Frechet distance one half against the other"
UNMATCHED = (
    "each sample against the next, of a Frechet distance one half against the other; nearly every sample shows "
    "something of its own, so that these are upper bounds"
)


def interval(yardstick: Yardstick, metric: str) -> Interval | None:
    """The yardstick in a metric with its interval; None if it was not measured."""
    if (quality := yardstick["quality"].get(metric)) is None:
        return None
    of = Sampled(yardstick["samples"], yardstick["groups"], yardstick["extractor"])
    return value_interval(METRICS[metric], quality["value"], quality["se"], of, yardstick["groups"] - 1)


def yardsticks_told(yardsticks: Mapping[str, Yardstick], rows: Sequence[Row], metrics: Iterable[str]) -> str:
    """The part of a caption that says how far apart two uncached runs are at the rows' settings; empty without any."""
    settings = {(row["nfe"], row["guidance_scale"]) for row in rows if "not_run" not in row}
    lines, how = [], set()
    for yardstick in yardsticks.values():
        found = {metric: interval(yardstick, metric) for metric in dict.fromkeys(metrics)}
        numbers = [f"{METRICS[name].label} {difference_text(number)}" for name, number in found.items() if number]
        if numbers and (yardstick["nfe"], yardstick["guidance_scale"]) in settings:
            lines.append(f"NFE {yardstick['nfe']}: {', '.join(numbers)}")
            how.add(MATCHED if yardstick["matched"] else UNMATCHED)
    if not lines:
        return ""
    told = "; ".join(lines)
    return f"Seed noise, what lies between two uncached runs of different noise ({'; '.join(sorted(how))}): {told}."
