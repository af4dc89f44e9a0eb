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
    here = [each for each in yardsticks.values() if (each["nfe"], each["guidance_scale"]) in settings]
    lines, how = [], set()
    for metric in dict.fromkeys(metrics):
        if found := [(each, number) for each in here if (number := interval(each, metric))]:
            numbers = (f"{difference_text(number)} at NFE {each['nfe']}" for each, number in found)
            lines.append(f"{METRICS[metric].label} {', '.join(numbers)}")
            how |= {MATCHED if each["matched"] else UNMATCHED for each, _ in found}
    if not lines:
        return ""
    told = "; ".join(lines)
    return f"Seed noise, what lies between two uncached runs of different noise ({'; '.join(sorted(how))}): {told}."
