# One job samples a group of rows, because importing torch costs seconds; on several GPUs several jobs sample it, each a
# range of its shards, and one that finds all there writes row.json. Shards are not declared as outputs: Snakemake would
# delete them before a rerun, and finished shards of unchanged settings are worth keeping.


def made_before(entries):
    return sorted({str(path) for entry in entries for path in entry.before_sampling})


def methods_of(entries):
    return sorted({entry.row.method for entry in entries})


def twins_of(entries):
    """What a variant shares with a row of the suite is copied; the shards themselves say whether they still fit."""
    return [ancient(SUITE[twin].manifest) for twin in sorted({entry.twin for entry in entries} - {None})]


def work(entries):
    return sum(entry.method.sampled_steps(entry.nfe) * entry.suite.samples.count for entry in entries)


# Ablations of the CPU are sampled where they are scored (ablations.smk).
GROUPS = {group: [SUITE[row] for row in rows] for group, rows in SUITE.groups.items()}
if ON_GPUS:
    GROUPS |= {entry.name: [entry] for ablation in SUITE.ablation_suites.values() for entry in ablation.entries}
LONGEST = max(map(work, GROUPS.values()))

# Rules per group, because the group decides which rows' files they write. A command is put together when its job starts,
# when the loop's variables are those of the last group: what differs between groups comes from `params`.
for group, entries in GROUPS.items():
    parts = sampling_parts(work(entries), LONGEST, entries[0].suite.samples.shards, GPUS) if ON_GPUS else 1
    # the longest first, so that the cores finish together
    urgency = sum(entry.nfe for entry in entries) * entries[0].suite.samples.count // SUITE.samples.count
    name = f"sample_{group}".replace("-", "_").replace(".", "_")
    needs = made_before(entries), twins_of(entries)
    sources = source_digest("sample", *methods_of(entries), data=SUITE.data.name)
    settings = [entries[0].suite.settings("sample"), *(entry.row_settings("sample") for entry in entries)]
    names = [entry.name for entry in entries]

    if parts > 1:

        rule:
            name:
                f"{name}_part"
            input:
                *needs,
            output:
                temp(touch(f"{RESULTS}/sampling/{group}/{{part}}-of-{parts}")),
            params:
                rows=names,
                parts=parts,
            log:
                f"{RESULTS}/logs/sample-{group}-{{part}}-of-{parts}.log",
            benchmark:
                f"{RESULTS}/benchmarks/sample-{group}-{{part}}-of-{parts}.tsv"
            threads: 1
            resources:
                gpu=1,
                **cluster_resources("sample", ON_GPUS),
            priority: urgency
            shell:
                f"tcbench sample {OF_SAMPLES} --rows {{params.rows}} --part {{wildcards.part}}/{{params.parts}} 2> {{log}}"

    rule:
        name:
            name
        input:
            *needs,
            [f"{RESULTS}/sampling/{group}/{part}-of-{parts}" for part in range(1, parts + 1)] if parts > 1 else [],
        output:
            [entry.manifest for entry in entries],
        params:
            code=sources,
            rows=names,
            settings=settings,
        log:
            f"{RESULTS}/logs/sample-{group}.log",
        benchmark:
            f"{RESULTS}/benchmarks/sample-{group}.tsv"
        threads: 1
        resources:
            gpu=int(ON_GPUS and parts == 1),
            **cluster_resources("sample", ON_GPUS),
        priority: urgency
        shell:
            f"tcbench sample {OF_SAMPLES} --rows {{params.rows}} 2> {{log}}"


rule latency:
    input:
        made_before(SUITE.entries),
    output:
        update(f"{RESULTS}/latency.json"),  # rows that were timed keep their times
    params:
        code=source_digest("latency", *methods_of(SUITE.entries), data=SUITE.data.name),
        settings=[SUITE.settings("latency"), *(entry.row_settings("latency") for entry in SUITE.entries)],
    log:
        f"{RESULTS}/logs/latency.log",
    # All cores, so that nothing else runs beside a measurement; torch itself stays at one thread (tcbench.cli).
    threads: ALL_CORES
    resources:
        gpu=int(ON_GPUS),
        **cluster_resources("latency", ON_GPUS),
    shell:
        f"tcbench latency {OF_SAMPLES} --missing 2> {{log}}"
