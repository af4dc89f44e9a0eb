# The speed suite has a config of its own, read when it is asked for. Timings are not declared as outputs: Snakemake would
# delete them before a rerun, and those of unchanged settings and code are worth keeping (tcbench/stages/bench.py).
SPEED_FILE = config.get("speed_file", "speed")  # a name or a path
try:
    SPEED = load_speed_suite(suite_file(SPEED_FILE))
    SPEED_FILE = suite_word(SPEED_FILE)
except UserError as error:
    raise WorkflowError(str(error)) from None
SPEED_METHODS = sorted({row.method for model in SPEED.models.values() for row in model.rows.values()})


rule speed:
    output:
        expand(f"results/{SPEED.suite}/tables/speed.{{kind}}", kind=["csv", "md", "tex", "html", "json"]),
        expand(f"results/{SPEED.suite}/figures/speed.{{kind}}", kind=["png", "svg"]),
    params:
        code=[source_digest("bench", *SPEED_METHODS), source_digest("speed")],
        settings=SPEED.model_dump(mode="json"),
    log:
        f"results/{SPEED.suite}/logs/speed.log",
    # All cores, so that nothing else runs beside a measurement.
    threads: ALL_CORES
    resources:
        gpu=int(SPEED.device == "cuda"),
    shell:
        "tcbench bench --config {SPEED_FILE:q} 2> {log}"
