"""Compare methods on a model of one's own at the same MACs, from the same noise, and print a table.

    python examples/compare.py

Each method's knob is solved for the budget of FORA at interval 3; distances are to the uncached samples.
"""

import torch
from tiny import tiny_dit

import tcbench
from tcbench.budget.matching import solve
from tcbench.method import Method
from tcbench.metrics.deviation import final_mae
from tcbench.models.specs import MODELS
from tcbench.sampling import Samples

STEPS, SAMPLES = 20, torch.arange(4)
SETTINGS = tcbench.SamplerSettings(guidance_scale=1.5, seed=0)


def main() -> None:
    """Match, sample and print."""
    transformer = tiny_dit().transformer
    spec = tcbench.spec_of(transformer).model_copy(update={"name": "mine"})
    MODELS[spec.name] = spec  # now every command that takes a model's name knows it
    adapter = tcbench.make_adapter(transformer, spec)

    def sample(method: Method) -> Samples:
        return tcbench.sample_batch(adapter, method, STEPS, SETTINGS, SAMPLES)

    uncached, fora = sample(tcbench.make_method("uncached", {})), tcbench.make_method("fora", {"interval": 3})
    whole, budget = (samples.macs["per_sample"] for samples in (uncached, sample(fora)))
    rivals = [
        tcbench.make_method("random_tokens", {"refiner_blocks": 1}),
        tcbench.make_method("tome", {"refiner_blocks": 1}),
        tcbench.make_method("fewer_steps", {}),
    ]
    print(f"{'method':<14} {'knob':<24} {'MACs':>8} {'fewer':>6}  {'MAE to uncached':>15}")
    for method in [fora, *(solve(spec.name, rival, STEPS, budget).method for rival in rivals)]:
        samples = sample(method)
        spent, mae = samples.macs["per_sample"], final_mae(samples.image, uncached.image).mean()
        knob = f"{method.knob}={getattr(method, method.knob):.3g}" if getattr(method, method.knob) else "interval=3"
        print(f"{method.label:<14} {knob:<24} {spent / 1e9:>6.3f} G {whole / spent:>5.2f}x  {mae:>15.4f}")


if __name__ == "__main__":
    main()
