"""Cost a suite's rows with what was trained for them: `tcbench match --suite`, `tcbench validate --macs`."""

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from tqdm import tqdm

from tcbench.config import Suite
from tcbench.errors import UserError
from tcbench.files import read_json
from tcbench.matching import SHAPES, Basis
from tcbench.method import Method
from tcbench.models.adapter import Adapter
from tcbench.sampling import Prompts, sample_batch
from tcbench.stages.common import artefacts_folder, load_adapter, load_captions, ready_row, sampler_settings
from tcbench.training.caching import CALIBRATION_INDEX, load_numbers


class Calibration:
    """What the MACs of a suite's rows are counted from.

    Args:
        suite: its results folder is where trained artefacts are looked for.
        batches: size of the calibration set, in batches as evaluated samples have them; it shares none with these.
    """

    def __init__(self, suite: Suite, batches: int = 2) -> None:
        if batches < 1:
            raise UserError(f"--batches {batches}: give 1 or more")
        self.suite, self.batches = suite, batches

    @cached_property
    def adapter(self) -> Adapter:
        """The suite's model, loaded when a row first needs it."""
        return load_adapter(self.suite)

    @cached_property
    def captions(self) -> Prompts | None:
        """What calibration samples show."""
        return load_captions(self.suite, held_out=False)

    def basis(self, row: str) -> Basis:
        """Shapes, if the row trains nothing or was not trained yet with the settings it has; else what was trained,
        and a calibration set if that does not settle the MACs.

        Raises:
            UserError: an artefact is damaged.
        """
        folder, source = artefacts_folder(self.suite, row), self.suite.trained_row(row)
        if not folder or not source or not (folder / "artefacts.json").exists():
            return SHAPES
        if read_json(folder / "artefacts.json")["settings"] != self.suite.training_settings(source):
            return SHAPES
        numbers = load_numbers(folder)
        if not self.suite.method(row).macs_depend_on(numbers):
            return Basis(numbers)
        ready = ready_row(self.suite, row, self.adapter)

        def measure(method: Method) -> Sequence[int]:
            size, settings = self.suite.batch_size, sampler_settings(self.suite, row)
            starts = [CALIBRATION_INDEX + batch * size for batch in range(self.batches)]
            macs = []
            for start in tqdm(starts, desc=f"calibrate {row}", unit="batch", mininterval=1, leave=False):
                index = torch.arange(start, start + size)
                sample = sample_batch(
                    ready.adapter, method, ready.nfe, settings, index, ready.artefacts, prompts=self.captions
                )
                macs.append(cast(int, sample.macs["per_sample"]))
            return macs

        return Basis(ready.artefacts, measure)
