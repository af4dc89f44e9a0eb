"""Which timesteps of the training schedule a sampler visits. Imports no torch."""

from itertools import accumulate, repeat

from tcbench.errors import UserError

TRAIN_TIMESTEPS = 1000
SPACINGS = ("linspace", "leading")


def respaced_timesteps(nfe: int, spacing: str = "linspace") -> tuple[int, ...]:
    """Timesteps in sampling order, as the reference code respaces them.

    `linspace` is its respacing string "N", which DiT, FORA, ToCa and L2C sample with: round(i * 999 / (N - 1)), the
    products by repeated addition, which is what rounds a tie like 499.5 up or down.
    `leading` is "ddimN": 0, k, 2k, ... for the whole stride k that fits exactly N times into 1000.

    Raises:
        UserError: unknown spacing, a number of steps outside 2..1000, or one that no whole stride gives.
    """
    if spacing not in SPACINGS:
        raise UserError(f"spacing: {spacing!r} is not one of {', '.join(SPACINGS)}")
    if not 2 <= nfe <= TRAIN_TIMESTEPS:
        raise UserError(f"nfe: {nfe} sampling steps; give 2 to {TRAIN_TIMESTEPS}")
    if spacing == "leading":
        timesteps = range(0, TRAIN_TIMESTEPS, -(-TRAIN_TIMESTEPS // nfe))
        if len(timesteps) != nfe:
            raise UserError(f"nfe: no whole stride gives {nfe} leading timesteps; {len(timesteps)} is the next below")
        return tuple(timesteps)[::-1]
    strides = repeat((TRAIN_TIMESTEPS - 1) / (nfe - 1), nfe - 1)
    return tuple(round(timestep) for timestep in accumulate(strides, initial=0.0))[::-1]
