"""Learning rate and KL weight as pure functions of the step, so that a resumed run can't get them wrong."""

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
    """Of the step that follows `step` finished ones: grows linearly to `kl_weight`, then stays.

    Warm-up as in Sønderby et al., "Ladder Variational Autoencoders", 2016, sec. 2.3.
    """
    if step < config.kl_warmup_steps:
        return config.kl_weight * (step + 1) / config.kl_warmup_steps
    return config.kl_weight
