"""The 1632 prompts of Yu et al. 2022, which ship."""

import csv
from pathlib import Path

from tcbench.data.source import PromptSet


class PartiPrompts(PromptSet):
    """PartiPrompts.tsv."""

    name = "partiprompts"
    shipped = "prompts/PartiPrompts.tsv"

    def read(self, path: Path) -> list[str]:
        """In the file's order."""
        with open(path, encoding="utf-8", newline="") as lines:
            return [row["Prompt"].strip() for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
