"""Put a caching method on a diffusers pipeline, call it as ever, and see what the method did.

Run it: `python examples/attach.py`.
"""

import torch
from tiny import tiny_dit

import tcbench


def main() -> None:
    """Sample with and without FORA, from the same noise."""
    pipe = tiny_dit()

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe([207, 360], num_inference_steps=20, generator=generator, output_type="pt").images

    plain = call()
    with tcbench.enable_cache(pipe, "fora", interval=3) as cached:
        held = call()
        print(cached.summary())
    print(f"mean absolute difference to the uncached images: {(held - plain).abs().mean():.4f}")
    print("off again, bit for bit:", torch.equal(call(), plain))


if __name__ == "__main__":
    main()
