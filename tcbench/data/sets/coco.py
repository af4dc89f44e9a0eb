"""The first caption of every image of MSCOCO, by image number (Lin et al. 2014)."""

from pathlib import Path

from tcbench.data.prompts import coco_captions
from tcbench.data.source import PromptSet


class Coco(PromptSet):
    """Of captions_val2017.json."""

    name = "coco"
    describes_images = True

    def read(self, path: Path) -> list[str]:
        """By image number."""
        return [caption for _, caption in coco_captions(path)]
