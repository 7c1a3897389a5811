"""What the residual network is made of. All norms are group norms: nothing depends on the other images of a batch."""

import math

import torch
from torch import Tensor, nn


def group_norm(width: int, num_groups: int = 8) -> nn.GroupNorm:
    """Group norm (Wu and He, 2018) with 8 groups, or as many as divide the width."""
    return nn.GroupNorm(math.gcd(num_groups, width), width)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), (B, width, H, W): pre-activation, He et al., 2016b.

    The last convolution is 0 at first, so that the block starts as the identity and depth costs the start no stability
    (Zhang et al., "Fixup Initialization", 2019). A class scales and shifts what comes out of the second norm (FiLM,
    Perez et al., 2018), by nothing at first.
    """

    def __init__(self, width: int, num_classes: int = 0) -> None:
        super().__init__()
        self.before = nn.Sequential(group_norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm = group_norm(width)
        self.after = nn.Sequential(nn.SiLU(), zero(nn.Conv2d(width, width, 3, padding=1)))
        self.film = nn.Embedding(num_classes, 2 * width) if num_classes else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same shape; `labels` (B,) int64 where there are classes."""
        inner = self.norm(self.before(features))
        if self.film is not None:
            scale, shift = self.film(labels)[:, :, None, None].chunk(2, dim=1)
            inner = inner * (1 + scale) + shift
        outcome: Tensor = features + self.after(inner)
        return outcome


class Attention(nn.Module):
    """x + self-attention over all positions, (B, width, H, W), 0 at first: Wang et al., 2018; heads: Vaswani, 2017.

    Written out: on GPUs the fused kernels add up gradients in no fixed order (flash attention's atomics), and a run
    that is resumed has to give the same bits.
    """

    def __init__(self, width: int, num_heads: int = 1, num_groups: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(width, num_groups)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """The same shape."""
        qkv = self.to_qkv(self.norm(features)).flatten(2).unflatten(1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(1)  # (B, heads, width / heads, positions) each
        scores = query.transpose(2, 3) @ key * query.shape[2] ** -0.5
        seen = value @ torch.softmax(scores, dim=3).to(value.dtype).transpose(2, 3)
        outcome: Tensor = features + self.out(seen.flatten(1, 2).unflatten(2, features.shape[2:]))
        return outcome


class Upsample(nn.Sequential):
    """(B, num_in, H, W) → (B, num_out, 2H, 2W): nearest neighbours and a convolution, no checkerboard.

    Odena et al., "Deconvolution and Checkerboard Artifacts", 2016.
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(num_in, num_out, 3, padding=1))


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with weights and bias 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
