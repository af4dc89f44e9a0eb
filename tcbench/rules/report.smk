TABLES = [*SUITE.tables] + (["table1"] if SUITE.predictor_rows else [])
FIGURES = ["quality", "trajectory"] + (["alpha"] if SUITE.predictor_rows else [])
NFES = list(dict.fromkeys(row.nfe for row in SUITE.rows.values()))


rule render_tables:
    input:
        scores=expand(f"{RESULTS}/scores/{{row}}.json", row=SUITE.rows),
        floor=rules.floor.output,
        latency=rules.latency.output,
        code=source_files("report"),
    output:
        expand(f"{RESULTS}/tables/{{name}}.{{kind}}", name=TABLES, kind=["csv", "md", "tex", "html"]),
        expand(f"{RESULTS}/grids/nfe{{nfe}}.png", nfe=NFES),
        expand(f"{RESULTS}/grids/{{row}}.png", row=SUITE.rows),
    params:
        settings=[SUITE.differs, SUITE.guidance.scale, SUITE.figure.model_dump(), SUITE.model_dump(include={"tables"})],
    log:
        f"{RESULTS}/logs/tables.log",
    threads: 1
    shell:
        "tcbench tables {SUITE_FILE:q} 2> {log}"


rule render_figures:
    input:
        scores=expand(f"{RESULTS}/scores/{{row}}.json", row=SUITE.rows),
        floor=rules.floor.output,
        trained=expand(f"{RESULTS}/trained/{{row}}/artefacts.json", row=SUITE.predictor_rows),
        code=source_files("report"),
    output:
        expand(f"{RESULTS}/figures/{{name}}.{{kind}}", name=FIGURES, kind=["png", "svg"]),
    params:
        settings=[SUITE.differs, SUITE.figure.model_dump()],
    log:
        f"{RESULTS}/logs/figures.log",
    threads: 1
    shell:
        "tcbench figures {SUITE_FILE:q} 2> {log}"


rule diagnostics:
    input:
        expand(f"{RESULTS}/diagnostics/{{row}}.json", row=SUITE.predictor_rows),
        code=source_files("report"),
    output:
        expand(f"{RESULTS}/tables/local_error.{{kind}}", kind=["csv", "md", "tex", "html"]),
    log:
        f"{RESULTS}/logs/diagnostics.log",
    threads: 1
    shell:
        "tcbench diagnostics {SUITE_FILE:q} 2> {log}"

