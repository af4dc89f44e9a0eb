# tcbench: from suites' configs to their tables. The rules are in the package, so that `tcbench run` has them anywhere.
#   snakemake --cores all tables                          all embedded suites
#   snakemake --cores all tables --config suite=digits    one suite
include: "tcbench/rules/workflow.smk", overwrite_default_target=True
