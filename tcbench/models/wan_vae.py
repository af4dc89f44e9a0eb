"""Wan 2.1's video autoencoder, causal in time, by diffusers' class: 4k + 1 frames to k + 1 latent frames and back."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from tcbench.data import has_nan, rounded
from tcbench.models.pretrained import load_autoencoder_of
from tcbench.precision import Dtype, products


class WanAutoencoder:
    """The autoencoder of a folder, as diffusers saves it. Latents are standardised by channel, as its config says.

    Args:
        dtype: what it computes in.

    Attributes:
        channels: of a latent.

    Raises:
        UserError: the folder lacks something.
    """

    def __init__(self, folder: Path, device: torch.device | str, dtype: Dtype = "fp32") -> None:
        vae = load_autoencoder_of(AutoencoderKLWan, folder, device, dtype)
        self.vae, self.products = vae, dtype
        self.channels = vae.config.z_dim
        self.mean, self.std = (
            torch.tensor(by_channel, device=device)[:, None, None, None]
            for by_channel in (vae.config.latents_mean, vae.config.latents_std)
        )

    @torch.no_grad()
    def encode(self, videos: Tensor, noise: Tensor) -> Tensor:
        """Standardised latents drawn from the posterior, float32 [n, C, t, h, w] on the CPU.

        Args:
            videos: [n, 3, T, H, W] in [-1, 1].
            noise: standard normal, of the latents' shape.
        """
        latents = []
        for video, draw in zip(videos.split(1), noise.split(1), strict=True):
            with products(self.products):
                posterior = self.vae.encode(video.to(self.vae.device, self.vae.dtype)).latent_dist
            z = posterior.mean.float() + posterior.std.float() * draw.to(self.vae.device)
            latents.append(((z - self.mean) / self.std).cpu())
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Videos of standardised latents [n, C, t, h, w], and which of them hold NaN; nothing waits for the device.

        Returns:
            uint8 [n, 3, T, H, W] and bool [n], on the autoencoder's device
        """
        z = (latents.to(self.vae.device) * self.std + self.mean).to(self.vae.dtype)
        videos, broken = [], []
        with products(self.products):
            for video in z.split(1):
                decoded = self.vae.decode(video).sample.float()
                videos.append(rounded(decoded))
                broken.append(has_nan(decoded))
        return torch.cat(videos), torch.cat(broken)
