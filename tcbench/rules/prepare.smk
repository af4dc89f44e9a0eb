# The base model of a suite and the networks of its metrics, made from scratch by `pretrain`; those of the embedded suites
# ship with the package.


rule pretrain_one:
    output:
        f"{ROOT}/pretrained/{{what}}.safetensors",
        f"{ROOT}/pretrained/{{what}}-log.json",
    wildcard_constraints:
        what="denoiser|classifier|reader|clip",
    log:
        f"{ROOT}/logs/pretrain-{{what}}.log",
    threads: ALL_CORES
    shell:
        f"tcbench pretrain {CONFIG} {{wildcards.what}} --out {ROOT}/pretrained 2> {{log}}"


rule pretrain:
    input:
        expand(f"{ROOT}/pretrained/{{what}}.safetensors", what=SUITE.source.recipes),
