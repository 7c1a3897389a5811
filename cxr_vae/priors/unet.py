"""The velocity network of `flow_matching`: a small U-Net (Ronneberger et al. 2015; Dhariwal and Nichol 2021).

Residual blocks of group norm and SiLU, which time and class scale and shift (FiLM, Perez et al. 2018), and
self-attention where maps are 16 places a side or smaller, as in DDPM (Ho et al. 2020, appendix B). Everything is a
fixed sequence of operations on the device: it can be compiled and captured in a CUDA graph.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_vae.models.blocks import Attention, Upsample, group_norm, zero

NUM_GROUPS = 32
"""Of group norm, or as many as divide the width."""
HEAD_WIDTH = 64
"""Channels of an attention head, where they divide the width."""
LARGEST_ATTENDED = 16
"""Places a side of the largest map with self-attention, whose cost grows with the square of the places."""


class UNet(nn.Module):
    """Spatial latents (B, C, H, W), times (B,) in [0, 1] and classes (B,) int64 → velocities (B, C, H, W).

    `channels` holds the width of each resolution, each half the side of the one before, so sides must be divisible by
    2^(len(channels) - 1). `num_classes` counts the one that stands for "not told". Each place has an embedding of its
    own, added to what enters, since chests lie alike. At first the output is zero.
    """

    def __init__(
        self, latent_shape: tuple[int, ...], num_classes: int, channels: Sequence[int], num_blocks: int
    ) -> None:
        super().__init__()
        width = 4 * channels[0]
        self.num_frequencies = channels[0]
        self.embed_time = nn.Sequential(nn.Linear(2 * channels[0], width), nn.SiLU(), nn.Linear(width, width))
        self.embed_class = nn.Embedding(num_classes, width)
        num_latents, *sides = latent_shape
        self.enter = nn.Conv2d(num_latents, channels[0], 3, padding=1)
        self.places = nn.Parameter(torch.zeros(channels[0], *sides))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        attend = [max(sides) >> level <= LARGEST_ATTENDED for level in range(len(channels))]
        skips, current = [channels[0]], channels[0]
        for level, wide in enumerate(channels):
            if level:
                self.down.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                skips.append(current)
            for _ in range(num_blocks):
                self.down.append(Block(current, wide, width, attend=attend[level]))
                skips.append(current := wide)
        self.middle = nn.ModuleList(
            [Block(current, current, width, attend=True), Block(current, current, width, attend=False)]
        )
        for level, wide in reversed(list(enumerate(channels))):
            for _ in range(num_blocks + 1):
                self.up.append(Block(current + skips.pop(), wide, width, attend=attend[level]))
                current = wide
            if level:
                self.up.append(Upsample(current, current))
        self.leave = nn.Sequential(_norm(current), nn.SiLU(), zero(nn.Conv2d(current, num_latents, 3, padding=1)))

    def forward(self, latents: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        """See the class."""
        embedding = self.embed_time(sinusoids(times, self.num_frequencies)) + self.embed_class(classes)
        condition = F.silu(embedding)
        features = self.enter(latents) + self.places
        skips = [features]
        for layer in self.down:
            features = layer(features, condition) if isinstance(layer, Block) else layer(features)
            skips.append(features)
        for layer in self.middle:
            features = layer(features, condition)
        for layer in self.up:
            if isinstance(layer, Block):
                features = layer(torch.cat([features, skips.pop()], 1), condition)
            else:
                features = layer(features)
        velocity: Tensor = self.leave(features)
        return velocity


class Block(nn.Module):
    """Two convolutions beside a skip, the second's input scaled and shifted by the condition; then attention."""

    def __init__(self, num_in: int, num_out: int, width: int, *, attend: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(num_in), nn.SiLU(), nn.Conv2d(num_in, num_out, 3, padding=1))
        self.film = nn.Linear(width, 2 * num_out)
        self.norm = _norm(num_out)
        self.second = zero(nn.Conv2d(num_out, num_out, 3, padding=1))  # a block is the identity at first
        self.skip = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else nn.Identity()
        num_heads = num_out // HEAD_WIDTH if num_out % HEAD_WIDTH == 0 else 1
        self.attention = Attention(num_out, num_heads, NUM_GROUPS) if attend else nn.Identity()

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, C, H, W) and (B, width) → (B, C', H, W)."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        inner = self.norm(self.first(features)) * (1 + scale) + shift
        attended: Tensor = self.attention(self.skip(features) + self.second(F.silu(inner)))
        return attended


def sinusoids(times: Tensor, count: int) -> Tensor:
    """Times (B,) in [0, 1] → (B, 2 · count) cosines and sines of periods from 2π / 1000 to 20 π."""
    exponents = torch.arange(count, device=times.device, dtype=torch.float32) / count
    angles = 1000 * times.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], 1)


def _norm(width: int) -> nn.GroupNorm:
    return group_norm(width, NUM_GROUPS)
