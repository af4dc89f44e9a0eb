# An embedded suite's base model and the networks of its metrics ship with the package; `pretrain` makes them again from
# scratch. The reader of `scenes` serves `moving` too.
PRETRAINED = {
    "digits": ["denoiser", "classifier"],
    "scenes": ["denoiser", "reader", "clip"],
    "moving": ["denoiser"],
}


rule pretrain_one:
    output:
        f"{RESULTS}/pretrained/{{what}}.safetensors",
        f"{RESULTS}/pretrained/{{what}}-log.json",
    wildcard_constraints:
        what="denoiser|classifier|reader|clip",
    log:
        f"{RESULTS}/logs/pretrain-{{what}}.log",
    threads: workflow.cores
    shell:
        f"tcbench pretrain {CONFIG} {{wildcards.what}} --out {RESULTS}/pretrained 2> {{log}}"


rule pretrain:
    input:
        expand(f"{RESULTS}/pretrained/{{what}}.safetensors", what=PRETRAINED.get(SUITE.data, [])),
