# VBench runs in an environment of its own (6 GB), which nothing but `snakemake vbench_environment` installs; without it a
# row's file says what every dimension needs, and is made again once the environment is there.
VBENCH_ENVIRONMENT = f"{vbench_environment()}/requirements.txt"


rule vbench_environment:
    output:
        VBENCH_ENVIRONMENT,
    shell:
        f"tcbench vbench {CONFIG} --build-env"


rule vbench:
    input:
        f"{RESULTS}/samples/{{row}}/row.json",
        environment=[VBENCH_ENVIRONMENT] if os.path.exists(VBENCH_ENVIRONMENT) else [],
    output:
        f"{RESULTS}/vbench/{{row}}.json",
    params:
        code=source_digest("vbench"),
        settings=SUITE.settings("vbench"),
    log:
        f"{RESULTS}/logs/vbench-{{row}}.log",
    threads: 1
    resources:
        gpu=int(ON_GPUS),
        **cluster_resources("vbench", ON_GPUS),
    shell:
        f"tcbench vbench {OF_SAMPLES} --rows {{wildcards.row}} 2> {{log}}"


def videos_of(rows):
    scored = dict.fromkeys([*rows, *(SUITE[row].reference.name for row in rows)])
    return expand(f"{RESULTS}/vbench/{{row}}.json", row=scored) if "vbench" in SUITE.scoring.metrics else []


for group, rows in SUITE.scored_together.items():

    rule:
        name:
            f"score_{group}".replace("-", "_").replace(".", "_")
        input:
            samples=expand(f"{RESULTS}/samples/{{row}}/row.json", row=rows),
            references=expand(
                f"{RESULTS}/samples/{{row}}/row.json", row=sorted({SUITE[row].reference.name for row in rows})
            ),
            videos=videos_of(rows),
        output:
            update(expand(f"{RESULTS}/scores/{{row}}.json", row=rows)),  # rows that were scored keep their scores
        params:
            code=source_digest("score", data=SUITE.data.name),
            rows=rows,
            settings=[SUITE.settings("score"), *(SUITE[row].row_settings("score") for row in rows)],
        log:
            f"{RESULTS}/logs/score-{group}.log",
        threads: 1
        resources:
            gpu=int(ON_GPUS),
            **cluster_resources("score", ON_GPUS),
        priority: 5000  # as soon as there are samples, so that one can look early (target `partial`)
        shell:
            f"tcbench score {OF_SAMPLES} --rows {{params.rows}} --missing 2> {{log}}"


rule floor:
    output:
        f"{RESULTS}/scores/floor.json",
    params:
        code=source_digest("score", data=SUITE.data.name),
        settings=SUITE.settings("score"),
    log:
        f"{RESULTS}/logs/floor.log",
    threads: 1
    resources:
        gpu=int(ON_GPUS),
        **cluster_resources("floor", ON_GPUS),
    shell:
        f"tcbench floor {OF_SAMPLES} 2> {{log}}"


rule seed_noise:
    input:
        expand(f"{RESULTS}/samples/{{row}}/row.json", row=[entry.name for entry in SUITE.references]),
    output:
        f"{RESULTS}/scores/seed-noise.json",
    params:
        code=source_digest("score", data=SUITE.data.name),
        settings=[SUITE.settings("score"), *(entry.row_settings("score") for entry in SUITE.references)],
    log:
        f"{RESULTS}/logs/seed-noise.log",
    threads: 1
    resources:
        gpu=int(ON_GPUS),
        **cluster_resources("score", ON_GPUS),
    shell:
        f"tcbench seed-noise {OF_ROWS} 2> {{log}}"
