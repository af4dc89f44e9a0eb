ABLATION_SCORES = [
    str(ablation[row].scores) for ablation in SUITE.ablation_suites.values() for row in ablation.own
]

# One job per ablation: it samples its variants and scores them, so that torch is imported once. On GPUs the variants are
# sampled like the suite's rows (sample.smk), by as many jobs as there is work for.
for name, ablation in SUITE.ablation_suites.items():

    rule:
        name:
            f"ablate_{name}"
        input:
            made=made_before(ablation.entries),
            twins=twins_of(ablation.entries),
            samples=[entry.manifest for entry in ablation.entries] if ON_GPUS else [],
        output:
            [entry.scores for entry in ablation.entries],
        params:
            code=source_digest("ablate", *sorted({entry.row.method for entry in ablation.entries}), data=SUITE.data.name),
            name=name,
            settings=[ablation.settings("ablate"), *(entry.row_settings("ablate") for entry in ablation.entries)],
        log:
            f"{RESULTS}/logs/ablate-{name}.log",
        benchmark:
            f"{RESULTS}/benchmarks/ablate-{name}.tsv"
        threads: 1
        resources:
            gpu=int(ON_GPUS),
            **cluster_resources("score", ON_GPUS),
        # as in sample.smk
        priority: sum(entry.nfe for entry in ablation.entries) * ablation.samples.count // SUITE.samples.count
        shell:
            (
                f"tcbench score {OF_SAMPLES} --rows {' '.join(ablation.own)} 2> {{log}}"
                if ON_GPUS
                else f"tcbench ablate {OF_SAMPLES} --name {{params.name}} 2> {{log}}"
            )
