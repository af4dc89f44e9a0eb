TABLES = [*SUITE.tables] + (["table1"] if SUITE.adaptive_rows else [])
FIGURES = figure_names(SUITE)
# A row's numbers are means over its trainings.
SCORES = expand(f"{RESULTS}/scores/{{row}}.json", row=SUITE.rows) + [
    str(SUITE.ablation_suites[TRAININGS][row].scores) for rows in SUITE.repeats.values() for row in rows
]
# All rows are timed in one job, so of a part of them nothing is timed.
LATENCY = rules.latency.output if RESULTS == SHOWN else []
NFES = list(dict.fromkeys(row.nfe for row in SUITE.rows.values()))
CAPTIONS = os.path.join(PACKAGE, "assets", "report")


def table_files(names):
    """Every face of some tables; `snakemake --report` shows the HTML one."""
    files = expand(f"{SHOWN}/tables/{{name}}.{{kind}}", name=names, kind=["csv", "md", "tex", "json"])
    shown = dict(caption=os.path.join(CAPTIONS, "table.rst"), category="Tables")
    return files + [report(f"{SHOWN}/tables/{name}.html", **shown, labels={"table": name}) for name in names]



rule render_tables:
    input:
        scores=SCORES,
        floor=rules.floor.output,
        seed_noise=rules.seed_noise.output,
        latency=LATENCY,
    output:
        table_files(TABLES),
        expand(f"{SHOWN}/grids/nfe{{nfe}}.png", nfe=NFES),
        expand(f"{SHOWN}/grids/strips/{{row}}.png", row=SUITE.rows),
        expand(f"{SHOWN}/grids/strips/{{row}}.webp", row=SUITE.rows if SUITE.decodes_videos else []),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{SHOWN}/logs/tables.log",
    threads: 1
    shell:
        f"tcbench tables {OF_ROWS} 2> {{log}}"


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
        f"{SHOWN}/logs/ablations.log",
    threads: 1
    shell:
        f"tcbench ablations {OF_ROWS} 2> {{log}}"


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
        f"{SHOWN}/logs/diagnostics.log",
    threads: 1
    shell:
        f"tcbench diagnostics {OF_ROWS} 2> {{log}}"


def figure_files():
    shown = dict(caption=os.path.join(CAPTIONS, "figure.rst"), category="Figures")
    labels = {name: {"figure": PICTURES[name].place or name, "shows": PICTURES[name].caption} for name in FIGURES}
    return [report(f"{SHOWN}/figures/{name}.png", **shown, labels=labels[name]) for name in FIGURES]


# Figures read everything but latency: ablations and diagnostics too.
EVERYTHING = {
    "scores": SCORES,
    "ablations": ABLATION_SCORES,
    "trained": expand(f"{ROOT}/trained/{{row}}/artefacts.json", row=SUITE.trained_rows),
    "diagnostics": expand(f"{RESULTS}/diagnostics/{{row}}.json", row=SUITE.predictor_rows),
    "strips": expand(f"{SHOWN}/grids/strips/{{row}}.png", row=SUITE.rows),
    "floor": rules.floor.output,
    "seed_noise": rules.seed_noise.output,
    "latency": LATENCY,
}


# Figures and page show as many rivals as there are, and have none run, but wait for those that this call runs. They are
# made again when there are others.
def rivals_asked_for(_):
    asked = {"rivals", f"{SUITE.suite}_rivals"} & {*workflow.dag_settings.targets}
    return [f"{SHOWN}/tables/rivals.md"] if SUITE.rivals and asked else []


def rivals_there(_):
    there = [] if rivals_asked_for(_) else sorted(glob.glob(f"{glob.escape(SHOWN)}/rivals/*.json"))
    return [f"{path} {os.path.getmtime(path)}" for path in there]


rule render_figures:
    input:
        **EVERYTHING,
        rivals=rivals_asked_for,
    output:
        expand(f"{SHOWN}/figures/{{name}}.svg", name=FIGURES),
        figure_files(),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
        rivals=rivals_there,
    log:
        f"{SHOWN}/logs/figures.log",
    threads: 1
    shell:
        f"tcbench figures {OF_ROWS} 2> {{log}}"


rule render_verdicts:
    input:
        **EVERYTHING,
    output:
        table_files(["verdicts"]),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{SHOWN}/logs/verdicts.log",
    threads: 1
    shell:
        f"tcbench verdicts {OF_ROWS} 2> {{log}}"


rule render_report:
    input:
        **EVERYTHING,
        rivals=rivals_asked_for,
        figures=rules.render_figures.output,
    output:
        report(
            f"{SHOWN}/report.html",
            caption=os.path.join(CAPTIONS, "report.rst"),
            category="Report",
            labels={"suite": SUITE.suite},
        ),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
        rivals=rivals_there,
    log:
        f"{SHOWN}/logs/report.log",
    threads: 1
    shell:
        f"tcbench report {OF_ROWS} 2> {{log}}"


# What is scored so far, beside the run that goes on; it says which rows these are.
rule partial:
    shell:
        f"tcbench tables {OF_ROWS} --partial && tcbench report {OF_ROWS} --partial"
