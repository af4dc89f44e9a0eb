# The embedded suites' base model and feature extractor ship with the package; `pretrain` makes them again from scratch.


rule pretrain_one:
    output:
        f"{RESULTS}/pretrained/{{what}}.safetensors",
        f"{RESULTS}/pretrained/{{what}}-log.json",
    wildcard_constraints:
        what="denoiser|classifier",
    log:
        f"{RESULTS}/logs/pretrain-{{what}}.log",
    threads: workflow.cores
    shell:
        "tcbench pretrain {SUITE_FILE:q} {wildcards.what} --out {RESULTS}/pretrained 2> {log}"


rule pretrain:
    input:
        expand(f"{RESULTS}/pretrained/{{what}}.safetensors", what=["denoiser", "classifier"]),
