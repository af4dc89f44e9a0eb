"""Verdicts: what a suite's results say about every claim of the paper, and what they can and cannot show."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.report.claims import CLAIMS, Claim
from tcbench.report.compare import LEVEL, MARGIN_RULE, against_references, families, too_few
from tcbench.report.findings import NOT_DECIDED, NOT_TESTED, Finding, untested
from tcbench.report.results import Results
from tcbench.report.rows import MATCHED, Row, quality_of, was_run
from tcbench.report.table import Table, check_face

COLUMNS = ("suite", "topic", "claim", "place", "measure", "verdict", "evidence")
"""Of verdicts.csv."""


def verdicts(results: Results) -> list[tuple[str, Claim, Finding]]:
    """Every claim, with the heading it stands under, once for each finding on the suite's own rows."""
    results = replace(results, rows=results.own_rows)
    found = []
    for topic, claims in CLAIMS.items():
        for claim in claims:
            testable = claim.of.include(results.suite.about.stands_for)
            findings = claim.test(results) if testable else [untested(f"a suite whose rows stand for {claim.of}")]
            found += [(topic, claim, finding) for finding in findings]
    return found


def what_it_can_show(results: Results) -> list[str]:
    """What the suite's size allows to see, computed: samples, minimum detectable differences, floor, guidance."""
    suite, rows = results.suite, results.own_rows
    scored = [row for row in rows if was_run(row)]
    sizes = sorted({(row["samples"], row["groups"]) for row in scored})
    lines = [
        f"Suite `{suite.suite}`: {suite.about.description}"
        + (
            f" ({suite.about.differs}): rankings may carry over to the paper's setting, values do not."
            if suite.about.differs
            else "."
        ),
        f"{' or '.join(f'{n} samples in {groups} batches' for n, groups in sizes)} per row, "
        f"noise seed {suite.samples.seed}, CFG scale {suite.sampler.guidance_scale:g} ({suite.about.guidance_rule}).",
    ]
    detectable = minimum_detectable(rows)
    if detectable:
        lines.append(
            "Minimum detectable difference to uncached (median over rows; 80 % power at the level that the marks have: "
            f"{LEVEL:.0%} over the rows of a metric and NFE): "
            + "; ".join(
                f"{METRICS[m].label} {size:.3g} ({share:.2g} of the uncached value)"
                for m, (size, share) in detectable.items()
            )
            + f". A smaller true difference will usually be {NOT_DECIDED}."
        )
        blind = [METRICS[m].label for m, (_, share) in detectable.items() if share > 0.1]
        if blind:
            lines.append(
                f"Differences of 10 % are out of this suite's sight in {', '.join(blind)}. The paired "
                "distance to the uncached samples (MAE) tells methods apart with far fewer samples, but it "
                "is another question: who stays closest to the uncached model, not who makes better images."
            )
    if needed := too_few(scored, [metric for metric in suite.scoring.metrics if metric in METRICS]):
        lines.append(f"Printed but not tested, for want of {needed}: docs/statistics.md says why.")
    if results.floor and "fid" in results.floor:
        floor = results.floor["fid"]
        lines.append(
            f"FID of {floor['n']} real images against all of them: {floor['mean']:.3g} ± {floor['std']:.2g}, which is "
            "what a perfect generator scores at this size."
        )
    if "guidance" not in results.ablations:
        lines.append(
            "The guidance sweep was not run, so that a lower FID may be a weaker guidance (target `ablations`)."
        )
    return lines


def minimum_detectable(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Per metric, medians over rows: the minimum detectable paired difference, its share of the uncached value.

    At the level of the smallest p-value of a family, which Holm's correction holds against `LEVEL` over its size.
    """
    metrics = [name for name in METRICS if "uncached" not in METRICS[name].needs]
    by_name = {row["row"]: row for row in rows}
    sizes: dict[str, list[tuple[float, float]]] = {}
    for family in families(against_references(rows, metrics, {}), by_name).values():
        for found in family:
            base = quality_of(by_name[found.other], found.metric)
            if base and base["value"] and found.interval.se:
                size = found.interval.detectable(LEVEL / len(family))
                sizes.setdefault(found.metric, []).append((size, abs(base["value"])))
    return {
        metric: (float(np.median([size for size, _ in found])), float(np.median([size / base for size, base in found])))
        for metric, found in sizes.items()
    }


def verdict_table(results: Results) -> Table:
    """All claims with their verdicts; the caption says what the suite can and cannot show."""
    found = verdicts(results)
    records = [
        (results.suite.suite, topic, claim.words, claim.place, finding.measure, finding.verdict, finding.evidence)
        for topic, claim, finding in found
    ]
    tidy = pd.DataFrame(records, columns=COLUMNS)
    printed = tidy[["claim", "place", "measure", "verdict", "evidence"]].copy()
    repeated = printed.duplicated(["claim", "place"])
    printed.loc[repeated, ["claim", "place"]] = ""
    rules = (
        f"Every test at {LEVEL:.0%}, on the intervals that the tables' marks use. Better than each of several rivals: "
        "reproduced if each by itself comes out better, not reproduced if any is worse (corrected over them, Holm), "
        f"else {NOT_DECIDED}. A rival without a row at matched MACs leaves it undecided; no rival at all, not tested. "
        "Without loss: reproduced if the 95 % interval of the loss lies below the margin, not reproduced if above it. "
        f"Margin: {MARGIN_RULE}. Control: the distance to the uncached samples, of which the claim says nothing. "
        f"Matched: MACs within {MATCHED:.0%}, overheads charged."
    )
    differs = f" ({results.suite.about.differs})" if results.suite.about.differs else ""
    return Table(
        title=f"Verdicts on the paper's claims, suite `{results.suite.suite}`{differs}",
        caption=rules,
        preface=what_it_can_show(results),
        tidy=tidy,
        formatted=printed.rename(columns=str.capitalize),
        groups=[topic for topic, _, _ in found],
        text_columns=("Claim", "Place", "Measure", "Verdict", "Evidence"),
    )


def _read_verdicts(path: Path) -> pd.DataFrame:
    try:
        if path.with_suffix(".json").exists():
            check_face(path)
        else:
            tqdm.write(f"{path}: of an older version: nothing vouches for it; run `tcbench verdicts`", file=sys.stderr)
        return pd.read_csv(path, keep_default_na=False)[[*COLUMNS]]
    except (ValueError, KeyError) as error:  # pandas' own exceptions are ValueErrors
        raise UserError(f"{path}: no table of verdicts ({error}); run `tcbench verdicts` again") from error


def read_all_verdicts(folder: Path) -> dict[str, pd.DataFrame]:
    """The rendered verdicts of every suite below `folder`, columns as in `COLUMNS`, by suite.

    Raises:
        UserError: no suite has verdicts, or a file of them is damaged.
    """
    paths = sorted(Path(folder).glob("*/tables/verdicts.csv"))
    if not paths:
        raise UserError(f"{folder}: no suite has verdicts (*/tables/verdicts.csv); run `tcbench verdicts` for one")
    found: dict[str, pd.DataFrame] = {}
    for path in paths:
        table, name = _read_verdicts(path), path.parent.parent.name
        said = [suite for suite in dict.fromkeys(table["suite"]) if suite != name]
        found[f"{name} (of suite {', '.join(said)})" if said else name] = table  # in a folder of another name
    return found


def across_suites(folder: Path) -> Table:
    """Every claim with the verdicts of every suite below `folder` whose verdicts were rendered, a column per suite.

    Raises:
        UserError: no suite has verdicts, or a file of them is damaged.
    """
    found = read_all_verdicts(folder)
    claims = pd.concat(found.values())[["topic", "claim", "place"]].drop_duplicates()
    lines = []
    for _, topic, claim, place in claims.itertuples():
        line = {"topic": topic, "claim": claim, "place": place}
        for suite, table in found.items():
            findings = table[(table["claim"] == claim) & (table["place"] == place)]
            pairs = zip(findings["measure"], findings["verdict"], strict=True)
            told = dict.fromkeys(": ".join(filter(None, pair)) for pair in pairs)
            needs = f"{NOT_TESTED}: {'; '.join(dict.fromkeys(findings['evidence']))}"
            line[suite] = needs if set(findings["verdict"]) <= {NOT_TESTED} else "; ".join(told)
        lines.append(line)
    printed = pd.DataFrame(lines)
    return Table(
        title="Verdicts on the paper's claims, by suite",
        caption="What each verdict rests on, its tests and what the suite can show at all: report.html of the suite.",
        tidy=printed,
        formatted=printed.drop(columns="topic").rename(columns={"claim": "Claim", "place": "Place"}),
        groups=list(claims["topic"]),
        text_columns=("Claim", "Place", *found),
    )
