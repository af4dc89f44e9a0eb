"""The jobs of a suite, as the workflow's rules make them, and what each of them has to do."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from math import prod
from pathlib import Path

from tcbench.budget.costing import macs_of, run_of_shapes
from tcbench.config.suite import Entry, Suite
from tcbench.data.videos import list_media
from tcbench.errors import UserError
from tcbench.forecast.rates import Rate, Rates, What
from tcbench.forecast.training import forward_macs, parameters, training_work
from tcbench.metrics.catalogue import EXTRACTORS, METRICS, ExtractorEntry
from tcbench.models.specs import MODELS, ModelSpec, VideoSpec
from tcbench.precision import Dtype
from tcbench.registry import make_method

ALONE = {"latency"}
"""Stages beside which nothing runs, by their rules."""

FULL_SETS = {"imagenet": 1_281_167, "train2017": 118_287, "val2017": 5_000, "mixkit": 1_997}
"""Images and videos of sets that are not there to be counted, by what stands in their folder's path."""

PARAMETERS = {"t5": 4.76e9, "mt5": 5.7e9}
"""Of the text encoders, whose 16-bit weights lie beside the denoiser's."""

_MEASURED_WIDTH = 2048
"""Features of an image where Frechet distances were timed, whose time goes with the third power."""

_NEIGHBOURS = 10_000
"""Real images in ADM's reference batch, for precision and recall."""

_SIDE = 8
"""Pixels of an image for one of its latent, along a side."""


@dataclass(frozen=True)
class Work:
    """An amount of work and how fast it goes.

    Attributes:
        stage, of: the line of the forecast that it counts for: a stage, and a row or what is trained.
    """

    stage: str
    of: str
    rate: Rate
    amount: float = 1

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.rate.of(self.amount)


@dataclass(frozen=True, eq=False)
class Job:
    """A job of the workflow.

    Attributes:
        stage, of: what it does, and for whom.
        command: of `tcbench`, without the config, which comes second.
        outputs: the files that its rule makes.
        needs: files of other jobs.
        parts: jobs of equal length that it may be cut into.
        disk: bytes that it leaves.
        memory: bytes of the card at its peak; 0 where that is not known.
    """

    stage: str
    of: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: tuple[str, ...]
    make: Callable[[], Iterable[Work]] = field(repr=False)
    parts: int = 1
    disk: float = 0
    memory: float = 0

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """What it has to do; costing a method takes a while, so only when asked."""
        return tuple(self.make())

    @property
    def seconds(self) -> float:
        """How long it takes as one process."""
        return sum(work.seconds for work in self.work)

    @property
    def alone(self) -> bool:
        """Whether nothing runs beside it."""
        return self.stage in ALONE

    def cut(self, parts: int) -> list["Job"]:
        """The same as several jobs, each a share of the work and a process of its own."""
        parts = min(parts, self.parts)
        if parts < 2:
            return [self]

        def share() -> Iterator[Work]:
            for work in self.work:
                once = work.rate.what in ("process", "load", "first batch")
                yield work if once else replace(work, amount=work.amount / parts)

        outputs = [
            self.outputs if part == 0 else tuple(f"{name}#{part}" for name in self.outputs) for part in range(parts)
        ]
        return [replace(self, make=share, parts=1, disk=self.disk / parts, outputs=names) for names in outputs]


class _Jobs:
    """Makes the jobs of one suite at the rates of one card."""

    def __init__(self, suite: Suite, rates: Rates) -> None:
        self.suite, self.rates, self.spec = suite, rates, MODELS[suite.model.name]
        self.model, self.shape = suite.model.name, MODELS[suite.model.name].shape
        self.dtypes: dict[str, Dtype] = suite.dtypes if rates.on_gpu else {name: "fp32" for name in suite.dtypes}
        frames = (self.spec.sample_frames - 1) * 4 + 1 if isinstance(self.spec, VideoSpec) else 1
        latent = self.spec.latent_shape
        scale = _SIDE if suite.model.latents else 1
        frames = frames if suite.model.latents else prod(latent[1:-2])
        self.pixels = frames * latent[-1] * latent[-2] * scale**2
        self.channels = 3 if suite.model.latents else latent[0]

    # --- jobs

    def all(self) -> Iterator[Job]:
        suite = self.suite
        trained = self._needed(lambda entry: entry.trains)
        searched = self._needed(lambda entry: bool(entry.row.searched))
        if suite.training.images and trained:
            yield self._encode()
        yield from map(self._train, trained)
        for entry in searched:
            command, work = ("search", "--row", entry.name), partial(self._searching, entry)
            yield self._job("search", entry.name, command, [entry.searched], entry.before_search, work)
        for group, rows in suite.groups.items():
            yield self._sample(group, [suite[row] for row in rows])
        for group, rows in suite.scored_together.items():
            yield self._score(group, [suite[row] for row in rows])
        yield self._job("score", "floor", ("floor",), [suite.folder / "scores" / "floor.json"], [], self._floor)
        before = [path for entry in suite.entries for path in entry.before_sampling]
        yield self._job("latency", "rows", ("latency",), [suite.folder / "latency.json"], before, self._latency)
        for row in suite.predictor_rows:
            entry = suite[row]
            yield self._job("diagnose", row, ("diagnose", "--row", row), [entry.diagnostics],
                            [entry.trained / "artefacts.json", *self._latents()], self._diagnosing)  # fmt: skip
        for name, ablation in suite.ablation_suites.items():
            yield self._ablate(name, ablation)
        scores = [entry.scores for entry in suite.entries]
        for page in ("tables", "figures", "report"):
            where = {"tables": suite.folder / "tables", "figures": suite.folder / "figures"}
            outputs = [where.get(page, suite.folder / "report.html")]
            yield self._job("render", page, (page,), outputs, scores, lambda: [self._one("render", "", "render")])

    def _encode(self) -> Job:
        count, numel = self._training_images(), prod(self.spec.latent_shape)

        def work() -> Iterator[Work]:
            yield self._start("encode", "")
            if self.rates.on_gpu:
                rate = self.rates.throughput("encode", self.dtypes["autoencoder"])
                yield Work("encode", "", rate, count * self.pixels)

        index = self.suite.latents_index
        parts = count if self.rates.on_gpu else 1
        return self._job("encode", "images", ("encode",), [index], [], work, parts=parts, disk=2.0 * count * numel)

    def _train(self, entry: Entry) -> Job:
        run = run_of_shapes(self.model, entry.method.sampled_steps(entry.nfe))
        stages = training_work(entry.method, self.model, run)

        def work() -> Iterator[Work]:
            yield from self._model("train", "processes")
            for stage in stages:
                of = (self.model, self.dtypes["training"], max(1, stage.batch))
                pair = forward_macs(self.model) * stage.passes
                rate = self.rates.training(stage.stage, *of, pair) if pair else self.rates.plain(*of)
                yield Work("train", stage.trains, rate, stage.macs)

        made, batch = entry.trained / "artefacts.json", max([1, *(stage.batch for stage in stages if stage.passes)])
        command, cards = ("train", "--row", entry.name), self.suite.training_gpus if self.rates.on_gpu else 1
        memory = self._training_memory(-(-batch // cards))
        return self._job("train", entry.name, command, [made], self._latents(), work, parts=cards, memory=memory)

    def _sample(self, group: str, entries: list[Entry]) -> Job:
        suite = self.suite
        rows = [entry.name for entry in entries]
        return self._job(
            "sample", group, ("sample", "--rows", *rows), [entry.manifest for entry in entries],
            [path for entry in entries for path in entry.before_sampling],
            lambda: [*self._model("sample", "processes"), *(w for entry in entries for w in self._sampling(entry))],
            parts=-(-suite.samples.count // suite.samples.group_size) if suite.jobs == "row" else 1,
            disk=sum(self._disk_of_samples(suite) for _ in entries),
            memory=max(map(self._sampling_memory, entries)),
        )  # fmt: skip

    def _score(self, group: str, entries: list[Entry]) -> Job:
        rows = [entry.name for entry in entries]
        needs = dict.fromkeys([entry.manifest for row in entries for entry in (row, row.reference)])
        return self._job(
            "score", group, ("score", "--rows", *rows), [entry.scores for entry in entries], needs,
            lambda: [self._start("score", "processes"), *(w for entry in entries for w in self._scoring(entry))],
            disk=4.0 * self._kept_numbers * self.suite.samples.count * len(entries),
        )  # fmt: skip

    def _ablate(self, name: str, ablation: Suite) -> Job:
        own = ablation.entries
        sampled = [entry for entry in own if entry.twin is None]
        twins = [self.suite[entry.twin].manifest for entry in own if entry.twin]
        needs = [*twins, *(path for entry in own for path in entry.before_sampling)]

        def work() -> Iterator[Work]:
            yield from self._model("ablate", name)
            for entry in sampled:
                yield from (replace(part, stage="ablate", of=name) for part in self._sampling(entry))
            for entry in own:
                yield from (replace(part, stage="ablate", of=name) for part in self._scoring(entry))

        return self._job(
            "ablate", name, ("ablate", "--name", name), [entry.scores for entry in own], needs, work,
            parts=len(own) if self.rates.on_gpu and self.suite.jobs == "row" else 1,
            disk=len(own) * self._disk_of_samples(ablation), memory=max([0.0, *map(self._sampling_memory, sampled)]),
        )  # fmt: skip

    def _job(
        self,
        stage: str,
        of: str,
        command: tuple[str, ...],
        outputs: Iterable[Path],
        needs: Iterable[Path],
        work: Callable[[], Iterable[Work]],
        *,
        parts: int = 1,
        disk: float = 0,
        memory: float = 0,
    ) -> Job:
        made, read = tuple(map(str, outputs)), tuple(dict.fromkeys(map(str, needs)))
        return Job(stage, of, command, made, read, work, parts, disk, memory)

    # --- work

    def _model(self, stage: str, of: str) -> Iterator[Work]:
        """A process that begins with the denoiser's weights, of 16 bits as they are published."""
        yield self._start(stage, of)
        if self.rates.on_gpu:
            yield self._one(stage, of, "load", 2 * parameters(self.model))

    def _start(self, stage: str, of: str) -> Work:
        return self._one(stage, of, "process")

    def _one(self, stage: str, of: str, what: str, amount: float = 1) -> Work:
        return Work(stage, of, self.rates.throughput(what), amount)  # type: ignore[arg-type]

    def _metric(self, of: str, what: What, amount: float) -> Work:
        return Work("score", of, self.rates.throughput(what, "fp32"), amount)

    def _running(self, stage: str, of: str, entry: Entry, samples: float, batch: int) -> Work:
        """Samples of a row, from noise to latents."""
        rate = self.rates.step(self.model, self.dtypes["denoiser"], batch)
        share = self.rates.efficiency(entry.row.method, self.model, entry.nfe).value
        macs = _macs(self.spec, entry.row.method, entry.method.model_dump_json(), entry.nfe)
        return Work(stage, of, rate, samples * macs / share)

    def _sampling(self, entry: Entry) -> Iterator[Work]:
        samples = entry.suite.samples
        yield self._running("sample", entry.name, entry, samples.count, samples.batch_size)
        if self.rates.on_gpu:
            yield self._one("sample", "processes", "first batch")
        if "autoencoder" in self.dtypes and self.rates.on_gpu:
            decoded = self.rates.throughput("decode", self.dtypes["autoencoder"])
            yield Work("decode", "", decoded, samples.count * self.pixels)

    def _scoring(self, entry: Entry) -> Iterator[Work]:
        """A row's own features and readings; its reference's are kept."""
        suite, count = entry.suite, entry.suite.samples.count
        if not self.rates.on_gpu and (row := self.rates.per_row(self.model)):
            yield Work("score", "", row)
            return
        metrics = [METRICS[name] for name in suite.scoring.metrics]
        replicates = 1 + -(-count // suite.samples.group_size)
        if self.rates.on_gpu:  # other networks are smaller than Inception
            yield Work("score", "features", self.rates.throughput("features", "tf32"), count * len(self._networks))
        if any(metric.per_sample and not metric.distance for metric in metrics) and self.rates.on_gpu:
            yield Work("score", "readings", self.rates.throughput("readings", "tf32"), count)
        compared = [metric for metric in metrics if {"images", "uncached"} <= metric.needs]
        if compared and self.rates.on_gpu:
            by_networks = sum(metric.per_sample for metric in compared)  # which are smaller than Inception, too
            features = self.rates.throughput("features", "tf32")
            yield Work("score", "pairs of images", features, 2 * count * by_networks)
            by_pixels = len(compared) - by_networks
            yield self._metric("pairs of images", "pairs", float(count) * self.pixels * by_pixels)
            yield self._one("score", "samples read", "read", 2.0 * count * self.pixels * self.channels)
        yield self._metric("Frechet distances", "frechet", self._moments * replicates)
        for name, network in self._networks.items():
            seen = [metric for metric in metrics if metric.extractor(suite.scoring.extractor) == name]
            if any("recall" in (metric.name, metric.repeats) for metric in seen):
                pairs = float(count) * (count + 2 * _NEIGHBOURS)
                yield self._metric("precision and recall", "distances", pairs * network.pooled)
                yield self._metric("precision and recall", "kept", float(count) * _NEIGHBOURS * replicates)
            if any(metric.name == "kid" for metric in seen) and self.rates.on_gpu:
                yield self._metric("KID", "kernel", float(count) * (count + _NEIGHBOURS) * network.pooled)

    @property
    def _networks(self) -> dict[str, ExtractorEntry]:
        """By name, those whose features the suite's metrics compare."""
        scoring = self.suite.scoring
        names = [METRICS[name].extractor(scoring.extractor) for name in scoring.metrics]
        return {name: EXTRACTORS[name] for name in names if name}

    @property
    def _kept_numbers(self) -> int:
        """Features and logits that are kept of an image."""
        return sum(network.pooled + network.spatial + network.classes for network in self._networks.values())

    @property
    def _moments(self) -> float:
        """A row's Frechet distances, in units of one between features of `_MEASURED_WIDTH`."""
        scoring, total = self.suite.scoring, 0.0
        for metric in (METRICS[name] for name in scoring.metrics):
            if metric.moments and (name := metric.extractor(scoring.extractor)):
                network = EXTRACTORS[name]
                width = network.pooled if metric.moments == "pooled" else network.spatial
                total += (width / _MEASURED_WIDTH) ** 3
        return total

    def _searching(self, entry: Entry) -> Iterator[Work]:
        search = self.suite.search
        yield from self._model("search", entry.name)
        batch = search.samples
        yield self._running("search", entry.name, entry, batch * search.trials, batch)
        yield self._running("search", entry.name, entry.reference, batch, batch)

    def _floor(self) -> Iterator[Work]:
        yield self._start("score", "floor")
        if self.rates.on_gpu:
            yield self._metric("floor", "frechet", self._moments * self.suite.scoring.floor_draws)

    def _latency(self) -> Iterator[Work]:
        protocol = self.suite.latency
        yield from self._model("latency", "")
        for entry in self.suite.entries:
            samples = (protocol.warmup + protocol.repeats) * protocol.batch_size
            yield self._running("latency", "", entry, samples, protocol.batch_size)

    def _diagnosing(self) -> Iterator[Work]:
        """Three passes a pair and half a one for each of 37 cases, which recompute 10 to 50 % of the blocks that may be
        cached and all of the others; trajectories."""
        asked, guidance = self.suite.diagnostics, self.spec.guidance(self.suite.sampler.guidance_scale)
        rate = self.rates.plain(self.model, self.dtypes["training"], asked.pairs)
        passes = asked.pairs * (3 + 37 / 2) + asked.trajectories * guidance.rows * self.suite.show.figure.nfe
        yield from self._model("diagnose", "")
        yield Work("diagnose", "", rate, passes * forward_macs(self.model))

    # --- sizes

    def _needed(self, fits: Callable[[Entry], bool]) -> list[Entry]:
        """Rows of the suite and its ablations, each once."""
        suites = (self.suite, *self.suite.ablation_suites.values())
        found = {entry.name: entry for suite in suites for entry in suite.entries if fits(entry)}
        return list(found.values())

    def _latents(self) -> list[Path]:
        return [self.suite.latents_index] if self.suite.training.images else []

    def _training_images(self) -> int:
        images = self.suite.training.images
        assert images is not None
        if images.folder.exists():
            return len(list_media(images.folder, images.captions, images.frames_per_second))
        known = next((count for word, count in FULL_SETS.items() if word in images.folder.parts), None)
        if known is None:
            raise UserError(f"{images.folder}: not there, so its images cannot be counted; put them there first")
        return known

    def _disk_of_samples(self, suite: Suite) -> float:
        return float(suite.samples.count) * self.pixels * self.channels

    def _weights(self) -> float:
        """Bytes of what lies on the card in all stages: the text encoder, in 16 bits."""
        folder = self.suite.model.text_encoder
        kind = "mt5" if folder and "mt5" in folder.name else "t5"
        return 2 * PARAMETERS[kind] if folder else 0.0

    def _sampling_memory(self, entry: Entry) -> float:
        if not self.rates.on_gpu:
            return 0.0
        batch = entry.suite.samples.batch_size
        rate = self.rates.memory("sample memory", self.model, batch, entry.row.method)
        wide = 1 if self.dtypes["denoiser"] in ("bf16", "fp16") else 2
        return (rate.of(batch) + 2 * parameters(self.model)) * wide + self._weights()

    def _training_memory(self, batch: int) -> float:
        if not self.rates.on_gpu:
            return 0.0
        values = batch * self.shape.stream_tokens * self.shape.width * self.shape.num_blocks
        rate = self.rates.memory("training memory", self.model, batch)
        if self.suite.training.checkpointed:  # both updates and the input of every block, and all of one block
            activations = 3 * 4 * values + rate.of(values / self.shape.num_blocks)
        else:
            activations = rate.of(values)
        weight = 2 if self.dtypes["training"] == "bf16" else 4  # of a model in which none learns
        return activations + weight * parameters(self.model) + self._weights()


@cache
def _macs(spec: ModelSpec, method: str, options: str, nfe: int) -> int:
    """Of a sample, everything charged; bounds at their dearest, and what is not trained yet at its floor."""
    return macs_of(spec.name, make_method(method, json.loads(options)), nfe)["per_sample"]


def jobs_of(suite: Suite, rates: Rates) -> list[Job]:
    """The jobs from training images to tables, ablations and report, in an order in which they could run.

    Raises:
        UserError: the images to train on are not there, and are no set whose size is known.
    """
    return list(_Jobs(suite, rates).all())


def default_card(suite: Suite) -> str:
    """The card of a suite that says no other."""
    return "h100" if suite.model.device == "cuda" else "cpu"
