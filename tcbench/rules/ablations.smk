ABLATION_SCORES = [
    f"{RESULTS}/ablations/{name}/scores/{row}.json"
    for name, ablation in SUITE.ablation_suites.items()
    for row in ablation.own
]

# One job per ablation: it samples its variants and scores them, so that torch is imported once.
for name, ablation in SUITE.ablation_suites.items():

    rule:
        name:
            f"ablate_{name}"
        input:
            made=made_before(ablation.entries),
            # what a variant shares with a row of the suite is copied; the shards themselves say whether they still fit
            twins=[ancient(f"{twin}/row.json") for twin in sorted({entry.twin for entry in ablation.entries} - {None})],
        output:
            expand(f"{RESULTS}/ablations/{name}/scores/{{row}}.json", row=ablation.own),
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
            gpu=int(SUITE.model.device == "cuda"),
        # as in sample.smk
        priority: sum(entry.nfe for entry in ablation.entries) * ablation.samples.count // SUITE.samples.count
        shell:
            f"tcbench ablate {CONFIG} --name {{params.name}} 2> {{log}}"
