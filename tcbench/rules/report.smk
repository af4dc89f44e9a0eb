TABLES = [*SUITE.tables] + (["table1"] if SUITE.predictor_rows else [])
FIGURES = figure_names(SUITE)
# A row's numbers are means over its trainings.
SCORES = expand(f"{RESULTS}/scores/{{row}}.json", row=SUITE.rows) + [
    f"{RESULTS}/ablations/{TRAININGS}/scores/{row}.json" for rows in SUITE.repeats.values() for row in rows
]
NFES = list(dict.fromkeys(row.nfe for row in SUITE.rows.values()))
CAPTIONS = os.path.join(PACKAGE, "assets", "report")


def table_files(names):
    """Every face of some tables; `snakemake --report` shows the HTML one."""
    files = expand(f"{RESULTS}/tables/{{name}}.{{kind}}", name=names, kind=["csv", "md", "tex", "json"])
    shown = dict(caption=os.path.join(CAPTIONS, "table.rst"), category="Tables")
    return files + [report(f"{RESULTS}/tables/{name}.html", **shown, labels={"table": name}) for name in names]



rule render_tables:
    input:
        scores=SCORES,
        floor=rules.floor.output,
        seed_noise=rules.seed_noise.output,
        latency=rules.latency.output,
    output:
        table_files(TABLES),
        expand(f"{RESULTS}/grids/nfe{{nfe}}.png", nfe=NFES),
        expand(f"{RESULTS}/grids/strips/{{row}}.png", row=SUITE.rows),
        expand(f"{RESULTS}/grids/strips/{{row}}.webp", row=SUITE.rows if SUITE.decodes_videos else []),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/tables.log",
    threads: 1
    shell:
        f"tcbench tables {CONFIG} 2> {{log}}"


rule render_ablations:
    input:
        ABLATION_SCORES,
        scores=SCORES,
        seed_noise=rules.seed_noise.output,
    output:
        table_files([f"ablation-{name}" for name in SUITE.ablations]),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/ablations.log",
    threads: 1
    shell:
        f"tcbench ablations {CONFIG} 2> {{log}}"


rule diagnostics:
    input:
        expand(f"{RESULTS}/diagnostics/{{row}}.json", row=SUITE.predictor_rows),
        scores=SCORES,
    output:
        table_files(["local_error"]),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/diagnostics.log",
    threads: 1
    shell:
        f"tcbench diagnostics {CONFIG} 2> {{log}}"


def figure_files():
    shown = dict(caption=os.path.join(CAPTIONS, "figure.rst"), category="Figures")
    labels = {name: {"figure": PICTURES[name].place or name, "shows": PICTURES[name].caption} for name in FIGURES}
    return [report(f"{RESULTS}/figures/{name}.png", **shown, labels=labels[name]) for name in FIGURES]


# Figures read everything but latency: ablations and diagnostics too.
EVERYTHING = {
    "scores": SCORES,
    "ablations": ABLATION_SCORES,
    "trained": expand(f"{RESULTS}/trained/{{row}}/artefacts.json", row=SUITE.trained_rows),
    "diagnostics": expand(f"{RESULTS}/diagnostics/{{row}}.json", row=SUITE.predictor_rows),
    "strips": expand(f"{RESULTS}/grids/strips/{{row}}.png", row=SUITE.rows),
    "floor": rules.floor.output,
    "seed_noise": rules.seed_noise.output,
    "latency": rules.latency.output,
}


rule render_figures:
    input:
        **EVERYTHING,
    output:
        expand(f"{RESULTS}/figures/{{name}}.svg", name=FIGURES),
        figure_files(),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/figures.log",
    threads: 1
    shell:
        f"tcbench figures {CONFIG} 2> {{log}}"


rule render_verdicts:
    input:
        **EVERYTHING,
    output:
        table_files(["verdicts"]),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/verdicts.log",
    threads: 1
    shell:
        f"tcbench verdicts {CONFIG} 2> {{log}}"


rule render_report:
    input:
        **EVERYTHING,
        figures=rules.render_figures.output,
    output:
        report(
            f"{RESULTS}/report.html",
            caption=os.path.join(CAPTIONS, "report.rst"),
            category="Report",
            labels={"suite": SUITE.suite},
        ),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/report.log",
    threads: 1
    shell:
        f"tcbench report {CONFIG} 2> {{log}}"
