"""All tables of a suite by name, from its results: what the files in tables/ and the report hold."""

from dataclasses import replace

from tcbench.config.suite import Suite
from tcbench.report.ablation_table import table_ablation
from tcbench.report.compare import margins
from tcbench.report.local_error_table import table_local_error
from tcbench.report.main_table import main_table
from tcbench.report.results import Results
from tcbench.report.schedule_table import table1
from tcbench.report.table import Table
from tcbench.report.verdicts import verdict_table


def stamped(tables: dict[str, Table], suite: Suite) -> dict[str, Table]:
    """The tables; of a preview they say so in their titles, and in their captions of which rows."""
    if suite.preview is None:
        return tables
    says = f"{suite.preview.says}: {', '.join(suite.rows)}."
    return {
        name: replace(table, title=f"{table.title} [{suite.preview.says}]", caption=f"{says} {table.caption}")
        for name, table in tables.items()
    }


def main_tables(results: Results) -> dict[str, Table]:
    """The paper's Tables II to VI, as far as the suite's rows stand beside them, and I; added rows are in the first."""
    suite = results.suite
    tables = {
        name: main_table(
            results.rows,
            results.latency,
            results.floor,
            differs=suite.about.differs,
            guidance_scale=suite.sampler.guidance_scale,
            computes_halves=suite.computes_halves,
            labels=suite.samples.labels,
            table=table,
            added=suite.added_rows,
            seed_noise=results.seed_noise,
        )
        for name, table in suite.tables.items()
    }
    if suite.adaptive_rows:
        stands_for = (
            (suite.about.stands_for.name, suite.about.stands_for.resolution) if suite.about.stands_for else None
        )
        tables["table1"] = table1(results.rows, differs=suite.about.differs, stands_for=stands_for)
    return stamped(tables, suite)


def ablation_tables(results: Results) -> dict[str, Table]:
    """One table per ablation that was run."""
    suite = results.suite
    tables = {
        f"ablation-{name}": table_ablation(
            suite.ablations[name],
            rows,
            suite.ablation_suites[name].variants,
            suite=suite.suite,
            differs=suite.about.differs,
            margins=margins(results.own_rows),
            seed_noise=results.seed_noise,
        )
        for name, rows in results.ablations.items()
    }
    return stamped(tables, suite)


def diagnostic_tables(results: Results) -> dict[str, Table]:
    """One-step local errors, if they were measured."""
    if not results.diagnostics:
        return {}
    nfe = {row: results.suite.rows[row].nfe for row in results.diagnostics}
    suite = results.suite
    diagnostics = list(results.diagnostics.values())
    table = table_local_error(diagnostics, nfe, suite=suite.suite, differs=suite.about.differs)
    return stamped({"local_error": table}, suite)


def verdict_tables(results: Results) -> dict[str, Table]:
    """The verdicts on the paper's claims."""
    return stamped({"verdicts": verdict_table(results)}, results.suite)


def all_tables(results: Results) -> dict[str, Table]:
    """Everything, the verdicts first."""
    return {
        **verdict_tables(results),
        **main_tables(results),
        **ablation_tables(results),
        **diagnostic_tables(results),
    }
