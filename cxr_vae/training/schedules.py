"""What changes from step to step, as functions of the step alone: a resumed run can't get it wrong."""

import math

from cxr_vae.config import ObjectiveConfig, OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Of the step that follows `step` finished ones: a linear warm-up, then constant or a cosine to 0.

    Cosine as in Loshchilov and Hutter, "SGDR", 2017, eq. 5, without restarts.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def kl_weight(step: int, config: ObjectiveConfig) -> float:
    """Of the step that follows `step` finished ones: grows linearly to `kl_weight`, then stays, or begins anew.

    Warm-up as in Sønderby et al., "Ladder Variational Autoencoders", 2016, sec. 2.3. Cycles as in Fu et al., "Cyclical
    Annealing Schedule", 2019, eq. 6 and 7: it grows in the first half of each (their R = 0.5).
    """
    if config.kl_cycle_steps:
        done = (step % config.kl_cycle_steps + 1) / config.kl_cycle_steps
        return config.kl_weight * min(1.0, 2 * done)
    if step < config.kl_warmup_steps:
        return config.kl_weight * (step + 1) / config.kl_warmup_steps
    return config.kl_weight


def ema_share(step: int, decay: float) -> float:
    """Of the newest weights in their average, at the step that follows `step` finished ones: 1, 0.9, … 1 - decay.

    A constant decay would keep the first weights in it for thousands of steps. So it grows from 0 as
    step / (step + 9), as that of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    return 1 - min(decay, step / (step + 9))
