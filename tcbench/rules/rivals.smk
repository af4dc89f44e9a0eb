# The table of rivals: a job for each contender solves its knob for every budget and samples and scores what comes of it. Which
# rows these are is in the file that it leaves.
RIVALS = {"uncached": "uncached", **SUITE.rivals.contenders} if SUITE.rivals else {}


def rows_of_rival(name):
    """What it starts from, before its knob is solved."""
    return SUITE.rival_suite.references if name == "uncached" else (SUITE.rival_suite[f"rivals-{name}"],)


for contender, method in RIVALS.items():

    rule:
        name:
            f"rival_{contender.replace('-', '_')}"
        input:
            made=[str(path) for row in rows_of_rival(contender) for path in row.before_sampling],
            uncached=[] if contender == "uncached" else [f"{RESULTS}/rivals/uncached.json"],
        output:
            f"{RESULTS}/rivals/{contender}.json",
        params:
            code=source_digest("rivals", method, data=SUITE.data.name),
            settings=[SUITE.settings("rivals"), *(row.row_settings("rivals") for row in rows_of_rival(contender))],
            contender=contender,
        log:
            f"{RESULTS}/logs/rival-{contender}.log",
        benchmark:
            f"{RESULTS}/benchmarks/rival-{contender}.tsv"
        threads: 1
        resources:
            gpu=int(ON_GPUS),
            **cluster_resources("sample", ON_GPUS),
        shell:
            f"tcbench rival {CONFIG} --method {{params.contender}} 2> {{log}}"


rule render_rivals:
    input:
        expand(f"{RESULTS}/rivals/{{contender}}.json", contender=RIVALS),
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
