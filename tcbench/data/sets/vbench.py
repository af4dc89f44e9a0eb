"""Every distinct prompt of VBench's suite (Huang et al. 2024)."""

from pathlib import Path

from pydantic import BaseModel

from tcbench.data.source import PromptSet
from tcbench.outside.foreign import read_json_as


class _Entry(BaseModel):
    prompt_en: str


class VBench(PromptSet):
    """VBench_full_info.json."""

    name = "vbench"

    def read(self, path: Path) -> list[str]:
        """In the file's order, each once."""
        return list(
            dict.fromkeys(entry.prompt_en for entry in read_json_as(path, list[_Entry], "the prompts of vbench"))
        )
