ABLATION_SCORES = [
    str(ablation[row].scores) for ablation in SUITE.ablation_suites.values() for row in ablation.own
]

# One job per ablation samples its variants and scores them, so that torch is imported once. On GPUs the variants are sampled
# like the suite's rows (sample.smk), by as many jobs as there is work for, and so they are scored.
EACH = ON_GPUS and SUITE.jobs == "row"
for name, ablation in SUITE.ablation_suites.items():
    for part, rows in {row: [row] for row in ablation.own}.items() if EACH else [(name, ablation.own)]:
        entries = [ablation[row] for row in rows]
        read = [*entries, *(entry.reference for entry in entries)] if ON_GPUS else []
        scores = [entry.scores for entry in entries]

        rule:
            name:
                f"ablate_{part}".replace("-", "_").replace(".", "_")
            input:
                made=made_before(entries),
                twins=twins_of(entries),
                samples=sorted({str(entry.manifest) for entry in read}),
            output:
                update(scores) if ON_GPUS else scores,  # as in score.smk
            params:
                code=source_digest("ablate", *methods_of(entries), data=SUITE.data.name),
                name=name,
                rows=rows,
                settings=[ablation.settings("ablate"), *(entry.row_settings("ablate") for entry in entries)],
            log:
                f"{RESULTS}/logs/ablate-{part}.log",
            benchmark:
                f"{RESULTS}/benchmarks/ablate-{part}.tsv"
            threads: 1
            resources:
                gpu=int(ON_GPUS),
                **cluster_resources("score", ON_GPUS),
            # as in sample.smk
            priority: sum(entry.nfe for entry in entries) * ablation.samples.count // SUITE.samples.count
            shell:
                (
                    f"tcbench score {OF_SAMPLES} --rows {{params.rows}} --missing 2> {{log}}"
                    if ON_GPUS
                    else f"tcbench ablate {OF_SAMPLES} --name {{params.name}} 2> {{log}}"
                )
