"""Every distinct prompt of VBench's suite (Huang et al. 2024)."""

from pathlib import Path

from tcbench.data.source import PromptSet
from tcbench.record.files import read_json


class VBench(PromptSet):
    """VBench_full_info.json."""

    name = "vbench"

    def read(self, path: Path) -> list[str]:
        """In the file's order, each once."""
        return list(dict.fromkeys(entry["prompt_en"] for entry in read_json(path)))
