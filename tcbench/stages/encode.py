"""Training images or videos through the autoencoder, once: shards of latents that all suites of the same ones share."""

import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.config.suite import Suite
from tcbench.data.images import Listing
from tcbench.data.videos import VideoListing
from tcbench.errors import UserError
from tcbench.models.pretrained import Autoencoder
from tcbench.models.specs import MODELS
from tcbench.models.wan_vae import WanAutoencoder
from tcbench.models.wf_vae import SPACE, TIME, VideoAutoencoder
from tcbench.record.files import digest, is_whole, read_metadata, seal, write_tensors
from tcbench.record.provenance import collect
from tcbench.record.records import LATENTS, LEFT_OUT
from tcbench.record.sources import source_digest
from tcbench.stages.images import autoencoder_digests, image_side, list_training_images, load_autoencoder
from tcbench.stages.part import WHOLE, Part
from tcbench.tensors import draws

Encoder = Autoencoder | VideoAutoencoder | WanAutoencoder

SHARD = 1024  # images: 8 MB of latents at 256x256
VIDEO_SHARD = 64  # videos: 25 MB of latents at 93 frames of 256x256
BATCH = 16
MOST_LEFT_OUT = 0.1  # of all videos


def encode_images(suite: Suite, part: Part = WHOLE) -> None:
    """Write results/latents/<key>/shard-*.safetensors, where not there and whole, and results/<suite>/latents.json.

    Several jobs, on as many GPUs, may each make a part of the shards; one without a part then writes latents.json.

    A latent is one draw from its image's posterior, keyed by the image's number, and kept in float16. The key
    identifies images (by name), autoencoder, resolution, seed and code. Videos that cannot be used are left out, each
    with a line that says why, and by their numbers in latents.json.

    Raises:
        UserError: the suite trains on no images, one cannot be read, or a tenth of the videos cannot be used, or the
            autoencoder is missing or not the model's.
    """
    started, listing = time.time(), list_training_images(suite)
    assert suite.model.latents and suite.training.images  # else refused above
    settings = {
        "images": listing.digest,
        "autoencoder": autoencoder_digests(suite),
        "scale": suite.model.latents.scale,
        "side": image_side(suite),
        "seed": suite.training.seed,
        "device": suite.model.device,
        "dtype": suite.dtypes["autoencoder"],
        "code": source_digest("encode"),
    }
    folder = Path("results") / "latents" / digest(settings)
    spent = part.spent(folder, digest(settings))
    load = cache(partial(load_autoencoder, suite))  # only where a shard is missing
    size = VIDEO_SHARD if isinstance(listing, VideoListing) else SHARD
    starts = range(0, len(listing), size)
    own = [starts[number] for number in part.shards(len(starts))]
    shards = {f"shard-{start // size:05d}.safetensors": start for start in own}
    total = sum(min(size, len(listing) - start) for start in own)
    left_out: dict[str, str] = {}
    with tqdm(total=total, desc="encode images", unit="image", mininterval=1) as bar:
        for name, start in shards.items():
            stop, record = min(start + size, len(listing)), (folder / name).with_suffix(".left-out.json")
            key = digest([settings, start])  # so that no shard is taken for another, nor what it left out
            if not _is_encoded(folder / name, record if isinstance(listing, VideoListing) else None, key):
                if isinstance(listing, VideoListing):
                    latents, without = _videos(suite, listing, load(), start, stop, bar)
                    LEFT_OUT.write(record, {"left_out": without, "key": key})
                else:
                    latents = _images(suite, listing, load(), start, stop)
                write_tensors(folder / name, {"latent": latents.half()}, {"key": key})
                spent.keep()
            left_out |= LEFT_OUT.read(record)["left_out"] if isinstance(listing, VideoListing) else {}
            if len(left_out) > MOST_LEFT_OUT * len(listing):
                raise UserError(
                    f"{suite.training.images.folder}: {len(left_out)} of the {len(listing)} videos cannot be used, "
                    f"{next(iter(left_out.values()))} for one; get them again or list others"
                )
            bar.update(stop - start)
    if part != WHOLE:
        return
    earlier = spent.earlier + sum(part.spent_by_others(folder, digest(settings)).values())
    LATENTS.write(
        suite.latents_index,
        {
            "folder": str(folder),
            "shards": {name: seal(folder / name) for name in shards},
            "images": len(listing) - len(left_out),
            "left_out": left_out,
            "settings": settings,
            "provenance": collect(suite.model_dump(mode="json"), [suite.training.seed], started, suite.dtypes, earlier),
        },
    )


def _is_encoded(shard: Path, record: Path | None, key: str) -> bool:
    """Whether a shard, and the record of what it left out, are there, whole, and those of this key."""
    if not is_whole(shard) or read_metadata(shard).get("key") != key:
        return False
    return record is None or (is_whole(record) and LEFT_OUT.read(record).get("key") == key)


def _images(suite: Suite, listing: Listing, autoencoder: Encoder, start: int, stop: int) -> Tensor:
    index, shape = torch.arange(start, stop), MODELS[suite.model.name].latent_shape
    batches = listing.decoded(image_side(suite), BATCH, start, stop)
    latents = [
        autoencoder.encode(images, draws.gaussian(suite.training.seed, part, shape))
        for images, part in zip(batches, index.split(BATCH), strict=True)
    ]
    return torch.cat(latents)


def _videos(
    suite: Suite, listing: VideoListing, autoencoder: Encoder, start: int, stop: int, bar: tqdm
) -> tuple[Tensor, dict[str, str]]:
    """Latents of the videos that can be used, and why others cannot, by number; where a clip begins is drawn."""
    shape = MODELS[suite.model.name].latent_shape
    frames, size = TIME * (shape[1] - 1) + 1, (SPACE * shape[2], SPACE * shape[3])
    latents, left_out = [torch.empty(0, *shape)], {}
    for number in range(start, stop):
        index = torch.tensor([number])
        place = draws.uniform(suite.training.seed, index, 1).item()
        try:
            video = listing.read(number, frames, size, place)
        except UserError as error:
            left_out[str(number)] = str(error)
            bar.write(f"left out: {error}", file=sys.stderr)
        else:
            latents.append(autoencoder.encode(video[None], draws.gaussian(suite.training.seed, index, shape)))
    return torch.cat(latents), left_out
