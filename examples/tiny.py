"""A DiT pipeline of diffusers' own, tiny and random, so that the examples run anywhere in seconds.

With weights it is `DiTPipeline.from_pretrained("facebook/DiT-XL-2-256", torch_dtype=torch.bfloat16).to("cuda")`.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


def tiny_dit() -> DiTPipeline:
    """Six blocks, 64 tokens, images of 16 x 16; every layer shows in the output."""
    torch.manual_seed(0)
    size = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 16}
    transformer = DiTTransformer2DModel(**size, out_channels=8).eval()
    first, *others = transformer.transformer_blocks
    for block in others:  # as in every official conversion, all blocks embed timestep and label alike
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    ends = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    vae = AutoencoderKL(**ends, block_out_channels=[8], norm_num_groups=4, latent_channels=4).eval()
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
