"""Cost a suite's rows with what was trained for them: `tcbench match --suite`, `tcbench validate --macs`.

torch is imported when a row is found to be trained.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from tcbench.budget.matching import SHAPES, Basis
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.record.records import TRAINED

if TYPE_CHECKING:
    from tcbench.models.adapter import Adapter
    from tcbench.sampling import Prompts


class Calibration:
    """What the MACs of a suite's rows are counted from.

    Args:
        suite: its results folder is where trained artefacts are looked for.
        batches: size of the calibration set, in batches as evaluated samples have them; it shares none with these.
        prepare: called before a model is loaded.
        loaded: the suite's model and the captions that calibration samples show, where they are there already.
    """

    def __init__(
        self,
        suite: Suite,
        batches: int = 2,
        prepare: Callable[[], None] = lambda: None,
        loaded: "tuple[Adapter, Prompts | None] | None" = None,
    ) -> None:
        if batches < 1:
            raise UserError(f"--batches {batches}: give 1 or more")
        self.suite, self.batches, self.prepare, self._loaded = suite, batches, prepare, loaded

    @cached_property
    def adapter(self) -> "Adapter":
        """The suite's model, loaded when a row first needs it."""
        if self._loaded:
            return self._loaded[0]
        from tcbench.stages.ready import load_adapter

        self.prepare()
        return load_adapter(self.suite)

    @cached_property
    def captions(self) -> "Prompts | None":
        """What calibration samples show."""
        if self._loaded:
            return self._loaded[1]
        from tcbench.stages.conditioning import load_captions

        return load_captions(self.suite, held_out=False)

    def basis(self, entry: Entry) -> Basis:
        """Shapes, if they settle the MACs or the row was not trained yet with the settings it has.

        Else what was trained, and a calibration set if that does not settle them either.

        Raises:
            UserError: an artefact is damaged.
        """
        source = entry.trained_as
        if source is None and entry.method.decides == "host":
            return self._measured(entry)
        if source is None or not (log := source.trained / "artefacts.json").exists():
            return SHAPES
        if TRAINED.read(log).get("settings") != source.training_settings:
            return SHAPES
        from tcbench.artefacts import load_numbers

        numbers = load_numbers(source.trained)
        if not entry.method.macs_depend_on(numbers):
            return Basis(numbers)
        return self._measured(entry)

    def _measured(self, entry: Entry) -> Basis:
        """MACs of a calibration set that runs through the engine."""
        from tcbench.stages.ready import ready_row

        ready = ready_row(entry, self.adapter)

        def measure(method: Method) -> Sequence[int]:
            import torch
            from tqdm import tqdm

            from tcbench.sampling import sample_batch
            from tcbench.stages.ready import sampler_settings
            from tcbench.training.pairs import CALIBRATION_INDEX

            size, settings = self.suite.samples.batch_size, sampler_settings(entry)
            starts = [CALIBRATION_INDEX + batch * size for batch in range(self.batches)]
            macs = []
            for start in tqdm(starts, desc=f"calibrate {entry.name}", unit="batch", mininterval=1, leave=False):
                index = torch.arange(start, start + size)
                sample = sample_batch(
                    ready.adapter, method, ready.nfe, settings, index, ready.artefacts, prompts=self.captions
                )
                macs.append(cast(int, sample.macs["per_sample"]))
            return macs

        return Basis(ready.artefacts, measure)
