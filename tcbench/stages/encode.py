"""Training images through the autoencoder, once: shards of latents that every suite of the same images shares."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from tcbench import noise
from tcbench.config import Suite
from tcbench.files import digest, write_json, write_tensors
from tcbench.models.specs import MODELS
from tcbench.provenance import collect
from tcbench.sources import source_digest
from tcbench.stages.common import autoencoder_digests, image_side, list_training_images, load_autoencoder

SHARD = 1024  # images: 8 MB of latents at 256x256
BATCH = 16


def encode_images(suite: Suite) -> None:
    """Write results/latents/<key>/shard-*.safetensors, those that are not there yet, and results/<suite>/latents.json.

    A latent is one draw from its image's posterior, keyed by the image's number, and kept in float16. The key
    identifies images (by name), autoencoder, resolution, seed and code.

    Raises:
        UserError: the suite trains on no images, one cannot be read, or the autoencoder is missing or not the model's.
    """
    started = time.time()
    listing, autoencoder = list_training_images(suite), load_autoencoder(suite)
    assert suite.latents and suite.training  # else refused above
    shape, side = MODELS[suite.model].latent_shape, image_side(suite)
    settings = {
        "images": listing.digest,
        "autoencoder": autoencoder_digests(suite),
        "scale": suite.latents.scale,
        "side": side,
        "seed": suite.training_seed,
        "device": suite.device,
        "code": source_digest("encode"),
    }
    folder = Path("results") / "latents" / digest(settings)
    shards = {f"shard-{start // SHARD:05d}.safetensors": start for start in range(0, len(listing), SHARD)}
    with tqdm(total=len(listing), desc="encode images", unit="image", mininterval=1) as bar:
        for name, start in shards.items():
            stop = min(start + SHARD, len(listing))
            if not (folder / name).exists():
                index = torch.arange(start, stop)
                latents = [
                    autoencoder.encode(images, noise.gaussian(suite.training_seed, part, shape))
                    for images, part in zip(listing.decoded(side, BATCH, start, stop), index.split(BATCH), strict=True)
                ]
                write_tensors(folder / name, {"latent": torch.cat(latents).half()})
            bar.update(stop - start)
    write_json(
        suite.latents_index,
        {
            "folder": str(folder),
            "shards": list(shards),
            "images": len(listing),
            "settings": settings,
            "provenance": collect(suite.model_dump(mode="json"), [suite.training_seed], started),
        },
    )
