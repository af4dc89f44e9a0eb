# One job samples a group of rows, because importing torch costs seconds. Shards are not declared as outputs: Snakemake
# would delete them before a rerun, and finished shards of unchanged settings are worth keeping.


def made_before(entries):
    return sorted({str(path) for entry in entries for path in entry.before_sampling})


def methods_of(group):
    return sorted({SUITE.rows[row].method for row in SUITE.groups[group]})


# A rule per group, because the group decides which rows' files it writes.
for group, rows in SUITE.groups.items():

    rule:
        name:
            f"sample_{group}".replace("-", "_").replace(".", "_")
        input:
            made_before(SUITE[row] for row in rows),
        output:
            expand(f"{RESULTS}/samples/{{row}}/row.json", row=rows),
        params:
            code=source_digest("sample", *methods_of(group), data=SUITE.data.name),
            rows=rows,
            settings=[SUITE.settings("sample"), *(SUITE[row].row_settings("sample") for row in rows)],
        log:
            f"{RESULTS}/logs/sample-{group}.log",
        benchmark:
            f"{RESULTS}/benchmarks/sample-{group}.tsv"
        threads: 1
        resources:
            gpu=int(SUITE.model.device == "cuda"),
        priority: sum(SUITE.rows[row].nfe for row in rows)  # the longest first, so that the cores finish together
        shell:
            f"tcbench sample {CONFIG} --rows {{params.rows}} 2> {{log}}"


rule latency:
    input:
        made_before(SUITE.entries),
    output:
        update(f"{RESULTS}/latency.json"),  # rows that were timed keep their times
    params:
        code=source_digest("latency", *sorted({row.method for row in SUITE.rows.values()}), data=SUITE.data.name),
        settings=[SUITE.settings("latency"), *(entry.row_settings("latency") for entry in SUITE.entries)],
    log:
        f"{RESULTS}/logs/latency.log",
    # All cores, so that nothing else runs beside a measurement; torch itself stays at one thread (tcbench.cli).
    threads: ALL_CORES
    resources:
        gpu=int(SUITE.model.device == "cuda"),
    shell:
        f"tcbench latency {CONFIG} --missing 2> {{log}}"
