"""What a decoder's logits say of the pixels: the likelihoods by name, each with the mean image that belongs to it.

`bernoulli` is the habit and no likelihood of grey values. `continuous_bernoulli` and `gaussian` are densities of pixels
in [0, 1]: their nats can be negative, and log 256 a pixel (8 bits) has to be added before they are compared with those
of 8-bit images. `discretized_logistic` is a probability of the 8-bit image itself, so its bits/dim are proper ones.

The scale of the pixels, where there is one, is a parameter of the model that all pixels share: it settles how much a
nat of reconstruction weighs against one of KL, which would else be a matter of `objective.kl_weight`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

START_LOG_SCALE = math.log(0.1)
"""A deviation of 0.1. Chest X-rays deviate from their mean image by 0.15, so this is near what a decoder that knows
little is best at. Much smaller, the first gradients would be huge; at 1, the start would be spent on shrinking it."""

NEAR_ZERO = 0.2
"""Of logits: below it the continuous Bernoulli's formulas, 0/0 at 0, are replaced by their series, exact in float32."""


@dataclass(frozen=True)
class Likelihood:
    """Of images in [0, 1] given logits (B, 1, H, W) and, where it has one, a log scale ()."""

    nll: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(logits, images, log_scale) → (B,) float32 nats, summed over pixels."""
    image: Callable[[Tensor], Tensor]
    """Logits → the mean image in [0, 1], float32."""
    start_log_scale: float | None = None
    """What the learned scale starts from; None: it has none."""


def bernoulli_nll(logits: Tensor, images: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of images in [0, 1] under Bernoulli pixels, summed over pixels: (B, 1, H, W) → (B,) nats.

    Grey values between 0 and 1 are taken as probabilities, as is the habit; the figure is then no log-likelihood of
    the 8-bit image, and its minimum is the entropy of the grey values, not 0.
    """
    nats = F.binary_cross_entropy_with_logits(logits.float(), images.float(), reduction="none")
    return nats.flatten(1).sum(1)


def continuous_bernoulli_nll(logits: Tensor, images: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """The Bernoulli made a density on [0, 1]: Loaiza-Ganem and Cunningham, 2019, eq. 6 and 7.

    With a logit η the density is exp(ηx) · η / (exp(η) - 1); near η = 0, λ = 1/2, the logarithm's series is used.
    """
    logits = logits.float()
    size = logits.abs().clamp(min=NEAR_ZERO)  # clamped, so that no 0/0 gets into the gradient of what isn't chosen
    far = logits.relu() + torch.log(-torch.expm1(-size) / size)
    near = logits / 2 + logits.square() / 24 - logits.pow(4) / 2880
    log_normaliser = torch.where(logits.abs() < NEAR_ZERO, near, far)
    return (log_normaliser - logits * images.float()).flatten(1).sum(1)


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """Its mean 1 / (1 - exp(-η)) - 1/η (their eq. 8), which is greyer than the sigmoid: 0.5 + η/12 - … near η = 0.

    Computed of |η|, since exp(-η) overflows below -88 and its gradient with it; the mean of -η is 1 less that of η.
    """
    logits = logits.float()
    size = logits.abs().clamp(min=NEAR_ZERO)
    brighter = -1 / torch.expm1(-size) - 1 / size
    far = torch.where(logits < 0, 1 - brighter, brighter)
    near = 0.5 + logits / 12 - logits.pow(3) / 720 + logits.pow(5) / 30240
    return torch.where(logits.abs() < NEAR_ZERO, near, far)


def gaussian_nll(logits: Tensor, images: Tensor, log_scale: Tensor) -> Tensor:
    """Normal pixels around sigmoid(logits) with one learned deviation: σ-VAE, Rybkin et al., 2021, section 3.1.

    The density is the plain normal one: that part of it lies outside [0, 1] is ignored, as it is there.
    """
    error = (images.float() - torch.sigmoid(logits.float())) * torch.exp(-log_scale.float())
    nats = 0.5 * error.square() + (log_scale.float() + 0.5 * math.log(2 * math.pi))
    return nats.flatten(1).sum(1)


def discretized_logistic_nll(logits: Tensor, images: Tensor, log_scale: Tensor) -> Tensor:
    """-log of the mass of the grey level k of k/255 under a logistic around sigmoid(logits): Kingma et al., 2016.

    The lowest and highest level take the tails (Salimans et al., 2017, section 2.1), so the 256 masses sum to 1. From
    S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)) for the sigmoid S, which is exact however small the mass is.
    """
    images, half = images.float(), 0.5 / 255
    centred = images - torch.sigmoid(logits.float())
    sharpness = torch.exp(-log_scale.float())
    below_top = F.logsigmoid((centred + half) * sharpness)
    above_bottom = F.logsigmoid((half - centred) * sharpness)
    between = torch.log(-torch.expm1(-2 * half * sharpness))
    darkest, brightest = images < half, images > 1 - half
    log_mass = below_top.masked_fill(brightest, 0.0) + above_bottom.masked_fill(darkest, 0.0)
    log_mass = log_mass + torch.where(darkest | brightest, 0.0, between)
    return -log_mass.flatten(1).sum(1)


def sigmoid_image(logits: Tensor) -> Tensor:
    """The mean of Bernoulli and normal pixels.

    Of discretised logistic ones the location: their mean differs where the tails beyond black and white weigh, by less
    than their scale, and the location is the level that is likeliest.
    """
    return torch.sigmoid(logits.float())


LIKELIHOODS = {
    "bernoulli": Likelihood(bernoulli_nll, sigmoid_image),
    "continuous_bernoulli": Likelihood(continuous_bernoulli_nll, continuous_bernoulli_mean),
    "gaussian": Likelihood(gaussian_nll, sigmoid_image, START_LOG_SCALE),
    # A logistic's deviation is π/√3 times its scale.
    "discretized_logistic": Likelihood(
        discretized_logistic_nll, sigmoid_image, START_LOG_SCALE - math.log(math.pi / math.sqrt(3))
    ),
}
