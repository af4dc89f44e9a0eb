for group, rows in SUITE.groups.items():

    rule:
        name:
            f"score_{group}".replace("-", "_").replace(".", "_")
        input:
            samples=expand(f"{RESULTS}/samples/{{row}}/row.json", row=rows),
            references=expand(
                f"{RESULTS}/samples/{{row}}/row.json", row=sorted({SUITE.reference(row) for row in rows})
            ),
            code=source_files("score"),
        output:
            expand(f"{RESULTS}/scores/{{row}}.json", row=rows),
        params:
            rows=rows,
            settings=[SUITE.metrics, SUITE.extractor, SUITE.data]
            + [SUITE.rows[row].model_dump(mode="json", by_alias=True) for row in rows],
        log:
            f"{RESULTS}/logs/score-{group}.log",
        threads: 1
        resources:
            gpu=int(SUITE.device == "cuda"),
        shell:
            "tcbench score {SUITE_FILE:q} --rows {params.rows} 2> {log}"


rule floor:
    input:
        code=source_files("score"),
    output:
        f"{RESULTS}/scores/floor.json",
    params:
        settings=[SUITE.extractor, SUITE.data, SUITE.samples, SUITE.floor_draws, SUITE.seed],
    log:
        f"{RESULTS}/logs/floor.log",
    threads: 1
    shell:
        "tcbench floor {SUITE_FILE:q} 2> {log}"
