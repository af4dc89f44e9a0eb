"""scikit-learn's copy of the UCI optical digits test set: 1797 images of 8x8 with 17 grey levels, in ten classes."""

from tcbench.data import Dataset, handwriting, split
from tcbench.data.source import DataSource


class Digits(DataSource):
    """Enlarged to 16x16 with PIL's bicubic kernel (sharper strokes than bilinear, by eye).

    No part is held out: classes are all there is to condition on. For pretraining's log a tenth is.
    """

    name = "digits"
    conditioning = "class"
    recipes = {"denoiser": {}, "classifier": {}}

    def images(self, held_out: bool = False) -> Dataset:
        """All 1797, [n, 1, 16, 16]; raises UserError if the installed copy is another one."""
        import torch.nn.functional as F

        digits = handwriting()
        images = F.interpolate(digits.images, size=16, mode="bicubic", align_corners=False, antialias=True)
        return Dataset(images.clamp(-1, 1), digits.labels)

    def parts(self, examples: int) -> tuple[Dataset, Dataset]:
        """Nine tenths and a tenth, with the classes in equal proportion."""
        return split(self.images())
