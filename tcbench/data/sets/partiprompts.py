"""The 1632 prompts of Yu et al. 2022, which ship."""

import csv
import io
from pathlib import Path

from tcbench.data.source import PromptSet
from tcbench.outside.foreign import read_text


class PartiPrompts(PromptSet):
    """PartiPrompts.tsv."""

    name = "partiprompts"
    shipped = "prompts/PartiPrompts.tsv"

    def read(self, path: Path) -> list[str]:
        """In the file's order."""
        rows = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["Prompt"] or "").strip() for row in rows]
