# What the methods themselves train: predictor, alpha-bar, refiners. The images that they need beside what ships are
# encoded once; suites of the same images share the latents. On several GPUs several jobs encode them, each a range of
# shards, and one that finds all there writes what they are.
ENCODERS = GPUS if ON_GPUS else 1

if ENCODERS > 1:

    rule encode_part:
        output:
            temp(touch(f"{ROOT}/encoding/{{part}}-of-{ENCODERS}")),
        log:
            f"{ROOT}/logs/encode-{{part}}-of-{ENCODERS}.log",
        threads: 1
        resources:
            gpu=1,
            **cluster_resources("encode", ON_GPUS),
        priority: 20000  # before training, which waits for all of them
        shell:
            f"tcbench encode {CONFIG} --part {{wildcards.part}}/{ENCODERS} 2> {{log}}"


rule encode:
    input:
        expand(f"{ROOT}/encoding/{{part}}-of-{ENCODERS}", part=range(1, ENCODERS + 1)) if ENCODERS > 1 else [],
    output:
        SUITE.latents_index,
    params:
        code=source_digest("encode"),
        settings=SUITE.settings("encode"),
    log:
        f"{ROOT}/logs/encode.log",
    threads: ALL_CORES if ENCODERS == 1 else 1
    resources:
        gpu=int(ON_GPUS and ENCODERS == 1),
        **cluster_resources("encode", ON_GPUS),
    priority: 20000
    shell:
        f"tcbench encode {CONFIG} 2> {{log}}"


rule train:
    input:
        latents=[SUITE.latents_index] if SUITE.training.images else [],
        files=lambda w: SUITE.find(w.row).method.files(),
    output:
        f"{ROOT}/trained/{{row}}/artefacts.json",
    params:
        code=lambda w: source_digest("train", SUITE.find(w.row).row.method, data=SUITE.data.name),
        settings=lambda w: SUITE.find(w.row).training_settings,
    log:
        f"{ROOT}/logs/train-{{row}}.log",
    benchmark:
        f"{ROOT}/benchmarks/train-{{row}}.tsv"
    threads: SUITE.training_gpus
    resources:
        gpu=SUITE.training_gpus if ON_GPUS else 0,
        **cluster_resources("train", ON_GPUS),
    priority: 10000  # before any sampling, because sampling waits for it
    shell:
        f"tcbench train {CONFIG} --row {{wildcards.row}} 2> {{log}}"


rule search:
    input:
        lambda w: SUITE.find(w.row).before_search,
    output:
        f"{ROOT}/searched/{{row}}.json",
    params:
        code=lambda w: source_digest("search", SUITE.find(w.row).row.method, data=SUITE.data.name),
        settings=lambda w: SUITE.find(w.row).settings("search"),
    log:
        f"{ROOT}/logs/search-{{row}}.log",
    benchmark:
        f"{ROOT}/benchmarks/search-{{row}}.tsv"
    threads: 1
    resources:
        gpu=int(ON_GPUS),
        **cluster_resources("search", ON_GPUS),
    priority: 9000  # as for training
    shell:
        f"tcbench search {CONFIG} --row {{wildcards.row}} 2> {{log}}"


rule diagnose:
    input:
        rules.train.output,
        latents=[SUITE.latents_index] if SUITE.training.images else [],
    output:
        f"{RESULTS}/diagnostics/{{row}}.json",
    params:
        code=lambda w: source_digest("diagnose", SUITE.rows[w.row].method, data=SUITE.data.name),
        settings=lambda w: SUITE[w.row].settings("diagnose"),
    log:
        f"{RESULTS}/logs/diagnose-{{row}}.log",
    threads: 1
    resources:
        gpu=int(ON_GPUS),
        **cluster_resources("diagnose", ON_GPUS),
    shell:
        f"tcbench diagnose {OF_SAMPLES} --row {{wildcards.row}} 2> {{log}}"
