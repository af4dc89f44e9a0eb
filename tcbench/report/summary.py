"""What was found, in a few lines and one picture, from the results of all suites: what README.md begins with.

Nothing of it is written by hand: `tcbench summary results/reference --write README.md` puts the lines between two marks
of the page and draws the picture, and tests/test_readme.py compares both with the results that are committed.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from tcbench.audit.checks import VERDICTS
from tcbench.config.document import Document
from tcbench.config.load import validated
from tcbench.config.speed import SpeedSuite
from tcbench.config.suite import BASELINE, Suite
from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.record.files import PROVENANCE, atomic, digest, write_text
from tcbench.record.records import PUBLISHED
from tcbench.report.beside import OURS, Beside, beside, best_first, distance_of, in_order, value_of
from tcbench.report.claims import MECHANISM
from tcbench.report.compare import too_few
from tcbench.report.figures import LOOK, styles
from tcbench.report.findings import CONTROL, NOT_DECIDED, NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from tcbench.report.results import Results, read_results
from tcbench.report.rivals_table import read_rivals
from tcbench.report.rows import Row, interval_of
from tcbench.report.speed import read_lines, was_held_up
from tcbench.report.verdicts import read_all_verdicts
from tcbench.workflow import SUITES

BEGIN, END = "<!-- tcbench summary: begin -->", "<!-- tcbench summary: end -->"
SPEED_AT = {"model": "dit-xl-2-256", "dtype": "bf16", "batch_size": 8, "nfe": 50}
"""The paper's own setting: batches of 8, 50 steps."""
AT_EQUAL_MACS = "speed-rivals", "speed-flows"
"""Suites of timings in which methods are brought to the same MACs."""
NEAR = 0.1
"""How far from TokenCache's a MAC ratio may be to count as the same there: steps are whole."""


def summary(folder: Path, link: str | None = None) -> list[str]:
    """The lines, in Markdown.

    Args:
        folder: published results, one folder a suite.
        link: what links to them begin with (default: the folder).

    Raises:
        UserError: nothing is published there, or a part of it is damaged.
    """
    link = link or folder.as_posix()
    results = read_published(folder)
    found = [found for each in results if (found := beside(each))]
    return [
        *(_quality(each, link) for each in results if _networks(each)),
        _distances(found, link),
        *_rivals(results, folder, link),
        _selectors(found, link),
        _claims(folder, link),
        _speeds(folder, link),
        _times(folder, link),
        _audited(folder, link),
    ]


def read_published(folder: Path) -> list[Results]:
    """The results of every suite below a folder that has TokenCache beside what costs as much, the embedded ones first.

    Raises:
        UserError: there are none.
    """
    there = [path.parent for path in sorted(folder.glob(f"*/{PROVENANCE}")) if (path.parent / "scores").is_dir()]
    there.sort(key=lambda path: SUITES.index(path.name) if path.name in SUITES else len(SUITES))
    results = [read_results(published(path, Suite), path, ()) for path in there]
    found = [each for each in results if beside(each)]
    if not found:
        raise UserError(f"{folder}: no published results with TokenCache; give a folder like results/reference")
    return found


def published(folder: Path, kind: type) -> Any:
    """The suite that published results were made with."""
    path = folder / PROVENANCE
    return validated(Document(path, PUBLISHED.read(path)["suite"]), kind)


def _networks(results: Results) -> list[str]:
    """FID, and the metric of a suite that repeats it with another network; none where no other repeats it, nor one of
    which the rows have too few samples."""
    metrics = results.suite.scoring.metrics
    second = [name for name in metrics if METRICS[name].repeats == "fid"]
    return [name for name in ("fid", *second) if second and not too_few(results.own_rows, [name])]


def _quality(results: Results, link: str) -> str:
    """Who has the lowest FID among what costs the same, by the suite's own network and by another."""
    metrics, suite = _networks(results), results.suite
    nfes = dict.fromkeys(row["nfe"] for row in results.own_rows)
    contests = [[*it.rivals, it.ours] for nfe in nfes if (it := beside(results, nfe))]
    won, clear = [], 0
    for metric in metrics:
        ranked = [best_first(rows, metric) for rows in contests]
        ours = [rows for rows in ranked if rows[0]["method"] == OURS]
        won.append(len(ours))
        clear += sum(_apart(rows[0], rows[1], metric) for rows in ours)
    at = beside(results)
    assert at
    told = [_told([*at.rivals, *at.selectors, at.ours], at.ours, metric) for metric in metrics]
    plain = [in_order(at.plain, metric) for metric in metrics]
    without = f" All without LoRA: {'; '.join(plain)}." if len(at.plain) > 1 else ""
    by_another = f", and at {won[1]} by another" if len(won) > 1 else ""
    clearly = f", in {clear} of these {sum(won)} by more than intervals" if sum(won) else ""
    named = ["Its own network", *(METRICS[name].label for name in metrics[1:])]
    return (
        f"**At equal MACs, TokenCache has the lowest FID at {won[0]} of {len(contests)} numbers of steps by the "
        f"suite's own network{by_another}**{clearly}, in {_table_of(at, link)} ({suite.about.description}; {_sizes(at)}"
        f"{_trained(at)}). {'; '.join(f'{name}: {values}' for name, values in zip(named, told, strict=True))}.{without}"
    )


def _told(rows: list[Row], ours: Row, metric: str) -> str:
    """The rows in order, and whether TokenCache's interval overlaps with that of a better first one."""
    first = best_first(rows, metric)[0]
    level = first is not ours and not _apart(first, ours, metric)
    return in_order(rows, metric) + (", its interval overlapping with the first's" if level else "")


def _trained(it: Beside) -> str:
    """Of how many trainings TokenCache's number is the mean."""
    trainings = it.ours["quality"]["fid"].get("trainings", [])
    return f", mean of {len(trainings)} trainings" if trainings else ""


def _table_of(found: Beside, link: str) -> str:
    """A suite's name, leading to its first table if it has one."""
    return f"[`{found.suite}`]({link}/{found.suite}/tables/{found.table}.md)" if found.table else f"`{found.suite}`"


def _apart(row: Row, other: Row, metric: str) -> bool:
    """Whether two rows' intervals of a metric have nothing in common."""
    one, two = interval_of(row, metric), interval_of(other, metric)
    assert one and two
    return one.high < two.low or two.high < one.low


def _distances(found: list[Beside], link: str) -> str:
    nearest = sum(all(distance_of(it.ours) <= distance_of(row) for row in it.rivals) for it in found)  # type: ignore[operator]
    told = "; ".join(f"{_table_of(it, link)} ({_sizes(it)}): " + in_order([*it.rivals, it.ours]) for it in found)
    return (
        f"**At equal MACs, TokenCache stays nearest to the uncached samples in {nearest} of {len(found)} suites.** "
        f"Mean absolute pixel difference, nearest first: {told}."
    )


def _sizes(it: Beside) -> str:
    return f"{it.ours['nfe']} steps, MAC ratio {it.ratio:.2f}, {it.ours['samples']} samples"


def _selectors(found: list[Beside], link: str) -> str:
    having = [it for it in found if it.selectors]
    better = sum(any(distance_of(row) < distance_of(it.ours) for row in it.selectors) for it in having)  # type: ignore[operator]
    told = "; ".join(f"`{it.suite}`: {in_order([*it.selectors, it.ours])}" for it in having)
    return (
        f"**In {better} of {len(having)} suites a choice of tokens that costs nothing stays nearer to the uncached "
        f"samples with those MACs,** because what the predictor costs buys full steps: {told} "
        f"([controls](docs/read-the-results.md))."
    )


FIRST = 3
"""So many of the best rivals are named."""


def _rivals(results: Sequence[Results], folder: Path, link: str) -> list[str]:
    """Who is best in every table of rivals at the budget nearest to the paper's, and where TokenCache comes."""
    told, places, paper = [], list[tuple[int, int]](), _timed(folder, OURS)["paper_mac_ratio"]
    for suite in (each.suite for each in results):
        rivals = read_rivals(suite, folder / suite.suite, partial=True)
        if suite.rivals is None or rivals is None:
            continue
        metric = "fid" if rivals.tell_fid else "mae"
        ratio = min(suite.rivals.ratios, key=lambda other: abs(other - paper))
        rows = [row for name in rivals.records if (row := rivals.row(rivals.at(name, ratio)))]
        ranked = [*enumerate(best_first(rows, metric), 1)]
        places += [(place, len(ranked)) for place, row in ranked if row["method"] == OURS]
        named = [
            _placed(row, place, metric) for place, row in ranked if place <= FIRST or row["method"] in (BASELINE, OURS)
        ]
        table = f"[`{suite.suite}`]({link}/{suite.suite}/tables/rivals.md)"
        at = f"{suite.rivals.nfe} steps, {ratio:g} times fewer, {rivals.uncached['samples']} samples"
        told.append(f"{METRICS[metric].label} in {table} ({at}): {', '.join(named)} of {len(ranked)}")
    if not places:
        return []
    best, of = min(places)
    return [
        f"**Among {of} rows at equal MACs, TokenCache is at place {best} at best.** The first {FIRST}, fewer steps "
        f"and TokenCache: {'; '.join(told)}."
    ]


def _placed(row: Row, place: int, metric: str) -> str:
    text = f"{row['label']} {value_of(row, metric):.3g}"
    named = f"**{text}**" if row["method"] == OURS else text
    return named if place <= FIRST else f"{named} at place {place}"


WORST_FIRST = (NOT_REPRODUCED, NOT_DECIDED, REPRODUCED)


def claims_counted(folder: Path) -> dict[str, dict[str, int]]:
    """How the paper's claims come out over all suites: counts by verdict, of main claims and of mechanism claims.

    A claim is what the worst of its findings is, of those that were tested; controls do not count.
    """
    counts = {
        kind: dict.fromkeys((REPRODUCED, NOT_REPRODUCED, NOT_DECIDED, NOT_TESTED), 0) for kind in ("main", "mechanism")
    }
    controls = {*CONTROL.values()} - {NOT_TESTED}
    found = pd.concat(read_all_verdicts(folder).values())
    for (topic, _, _), findings in found.groupby(["topic", "claim", "place"], sort=False):
        said = {*findings["verdict"]} - controls
        verdict = next((word for word in WORST_FIRST if word in said), NOT_TESTED)
        counts["mechanism" if topic in MECHANISM else "main"][verdict] += 1
    return counts


def _claims(folder: Path, link: str) -> str:
    told = []
    for kind, counts in claims_counted(folder).items():
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        told.append(f"of {sum(counts.values())} {kind} claims {words}")
    return f"**[The paper's claims]({link}/verdicts.md), as these small suites see them:** {'; '.join(told)}."


def _timed(folder: Path, method: str) -> Any:
    """A method's line at the paper's own setting."""
    lines = read_lines(published(folder / "speed", SpeedSuite), folder / "speed")
    return next(
        line for line in lines if line["method"] == method and all(line[key] == SPEED_AT[key] for key in SPEED_AT)
    )


def _speeds(folder: Path, link: str) -> str:
    ours, reference = _timed(folder, OURS), _timed(folder, "uncached")
    free = reference["macs_per_sample"] / ours["macs_without_overheads"]
    return (
        f"**The paper's speedup leaves the predictor out:** DiT-XL/2 at {SPEED_AT['nfe']} steps has a MAC ratio of "
        f"{free:.2f} without it (the paper's {ours['paper_mac_ratio']:.2f}), {ours['mac_ratio']:.2f} with it, and "
        f"{ours['latency_ratio']:.2f} in [time on a GPU]({link}/speed/tables/speed.md), "
        f"{ours['efficiency']:.0%} of the MAC saving."
    )


def _times(folder: Path, link: str) -> str:
    """How much faster methods are that cost about what TokenCache does, where that is nearest to the paper's ratio."""
    told, ratio = [], _timed(folder, OURS)["paper_mac_ratio"]
    for name in AT_EQUAL_MACS:
        lines = read_lines(published(folder / name, SpeedSuite), folder / name)
        timed = [line for line in lines if not line["not_run"] and not was_held_up(line)]
        for model in dict.fromkeys(line["stands_for"] for line in timed):
            of_model = [line for line in timed if line["stands_for"] == model]
            told.append(f"[{model}]({link}/{name}/tables/speed.md) {_at_equal_macs(of_model, ratio)}")
    return (
        "**Equal MACs are not equal time.** How many times faster than uncached on a GPU, the fastest, fewer steps, "
        f"TokenCache and the slowest: {'; '.join(told)} ([why](docs/speed.md#methods-at-equal-macs-and-other-models))."
    )


def _at_equal_macs(timed: Sequence[dict[str, Any]], ratio: float) -> str:
    """The rows of one model whose MACs are those of the TokenCache row nearest to a MAC ratio."""
    ours = min((line for line in timed if line["method"] == OURS), key=lambda it: abs(it["mac_ratio"] - ratio))
    level = sorted(
        (
            line
            for line in timed
            if all(line[key] == ours[key] for key in SPEED_AT)
            and line["method"] != "uncached"
            and abs(line["mac_ratio"] / ours["mac_ratio"] - 1) <= NEAR
        ),
        key=lambda line: -line["latency_ratio"],
    )
    named = [
        f"**{said}**" if line is ours else said
        for line in level
        if line["method"] in ("fewer_steps", OURS) or line in (level[0], level[-1])
        for said in [f"{line['label']} {line['latency_ratio']:.2f}"]
    ]
    return f"({len(level)} rows, MAC ratio {ours['mac_ratio']:.2f}): {', '.join(named)}"


def _audited(folder: Path, link: str) -> str:
    page = folder / "paper-audit.md"
    totals = re.search(r"^\| all\b[ |]*(\d+)[ |]+(\d+)[ |]+(\d+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if not totals:
        raise UserError(f"{page}: has no line of totals; run `tcbench audit` again")
    counts = ", ".join(f"{count} {verdict}" for count, verdict in zip(totals.groups(), VERDICTS, strict=True))
    return f"**[The paper's own numbers]({link}/paper-audit.md)**, derived again where that takes no weights: {counts}."


# --- the picture, and the page that both are in

Panel = tuple[Beside, str]
"""What costs the same, and the metric that is drawn of it."""

COLUMNS = 3


def panels(results: Sequence[Results]) -> list[Panel]:
    """Of every suite the distance to the uncached samples, and FID where two networks tell it."""
    found = [(it, each) for each in results if (it := beside(each))]
    distances = [(it, "mae") for it, _ in found]
    return distances + [(it, name) for it, each in found for name in _networks(each)]


@rc_context(LOOK)
def figure_summary(drawn: Sequence[Panel]) -> Figure:
    """A metric, with intervals, of the rows that cost what TokenCache does, by suite; the best on top."""
    sizes = [1 + len(it.rivals) + len(it.selectors) for it, _ in drawn]
    lines = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(8.6, (0.7 + 0.2 * max(sizes)) * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for unused in axes[len(drawn) :]:
        unused.set_axis_off()
    for panel, (it, metric) in zip(axes, drawn, strict=False):
        rows = best_first([it.ours, *it.rivals, *it.selectors], metric)[::-1]
        looks = styles(rows)
        for height, row in enumerate(rows):
            interval = interval_of(row, metric)
            assert interval
            look = {key: value for key, value in looks[row["row"]].items() if key != "linestyle"}
            panel.errorbar(
                interval.value,
                height,
                xerr=[[interval.value - interval.low], [interval.high - interval.value]],
                **look,
                markerfacecolor="none" if row["control"] else None,
                markersize=6,
                capsize=2,
            )
        panel.set_yticks(range(len(rows)), [row["label"].partition(",")[0] for row in rows], fontsize=8)
        for text, row in zip(panel.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if row["method"] == OURS else "normal")
        panel.set_xlim(left=0)
        panel.set_title(f"{it.suite}\n{it.ours['nfe']} steps, MAC ratio {it.ratio:.2f}", fontsize=8)
        panel.set_xlabel("distance to uncached (MAE)" if metric == "mae" else METRICS[metric].label, fontsize=8)
        panel.set_ylim(len(rows) - max(sizes) - 0.5, len(rows) - 0.5)
    return figure


def drawn_from(drawn: Sequence[Panel]) -> str:
    """Identifies the numbers of the picture, which carries this: fonts differ from machine to machine."""
    rows = [(row, metric) for it, metric in drawn for row in (it.ours, *it.rivals, *it.selectors)]
    shown = [(row, interval) for row, metric in rows if (interval := interval_of(row, metric))]
    return digest([[row["row"], row["label"], *(f"{x:.4g}" for x in (i.value, i.low, i.high))] for row, i in shown])


def write_summary(folder: Path, page: Path) -> Path:
    """Put the lines between the two marks of a page, and draw the picture that it shows.

    Args:
        page: Markdown with `BEGIN` and `END`; between them an image, whose file is written, and the lines.

    Returns:
        the picture.

    Raises:
        UserError: the page lacks the marks or the image, or as `summary`.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    shown, end, tail = rest.partition(END)
    image = re.search(r"!\[[^]]*\]\((\S+\.svg)\)", shown)
    if not (begin and end and image):
        raise UserError(f"{page}: needs an image (an .svg) between the lines {BEGIN} and {END}")
    drawn, picture = panels(read_published(folder)), page.parent / image[1]
    with atomic(picture) as temporary, rc_context(LOOK):
        metadata = {"Date": None, "Creator": "tcbench", "Description": drawn_from(drawn)}
        figure_summary(drawn).savefig(temporary, format="svg", metadata=metadata)
    lines = "\n".join(f"- {line}" for line in summary(folder))
    write_text(page, f"{head}{begin}\n{image[0]}\n\n{lines}\n{end}{tail}")
    return picture
