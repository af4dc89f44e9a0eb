"""The 200 prompts of DrawBench (Saharia et al. 2022), as caching papers pass them on: a text file, a prompt a line."""

from pathlib import Path

from tcbench.data.source import PromptSet
from tcbench.outside.foreign import read_text


class DrawBench(PromptSet):
    """DrawBench200.txt."""

    name = "drawbench"

    def read(self, path: Path) -> list[str]:
        """In the file's order."""
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
