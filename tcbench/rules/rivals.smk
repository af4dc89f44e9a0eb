# The table of rivals: a job for each method solves its knob for every budget and samples and scores what comes of it. Which
# rows these are is in the file that it leaves.
RIVALS = ["uncached", *SUITE.rivals.methods] if SUITE.rivals else []


def made_before_rival(method):
    """What was trained for it."""
    if method == "uncached":
        return []
    return [str(path) for path in SUITE.rival_suite[f"rivals-{method}"].before_sampling]


def rival_settings(method):
    """What the config says of it before its knob is solved."""
    return [entry.row_settings("rivals") for entry in SUITE.rival_suite.entries if entry.row.method == method]


for method in RIVALS:

    rule:
        name:
            f"rival_{method}"
        input:
            made=made_before_rival(method),
            uncached=[] if method == "uncached" else [f"{RESULTS}/rivals/uncached.json"],
        output:
            f"{RESULTS}/rivals/{method}.json",
        params:
            code=source_digest("rivals", method, data=SUITE.data.name),
            settings=[SUITE.settings("rivals"), *rival_settings(method)],
            method=method,
        log:
            f"{RESULTS}/logs/rival-{method}.log",
        benchmark:
            f"{RESULTS}/benchmarks/rival-{method}.tsv"
        threads: 1
        resources:
            gpu=int(ON_GPUS),
            **cluster_resources("sample", ON_GPUS),
        shell:
            f"tcbench rival {CONFIG} --method {{params.method}} 2> {{log}}"


rule render_rivals:
    input:
        expand(f"{RESULTS}/rivals/{{method}}.json", method=RIVALS),
    output:
        table_files(["rivals", "rivals-papers"]),
    params:
        code=source_digest("report"),
        settings=SUITE.digest(),
    log:
        f"{RESULTS}/logs/rivals.log",
    threads: 1
    shell:
        f"tcbench rivals {CONFIG} 2> {{log}}"
